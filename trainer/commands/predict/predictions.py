"""Predictions of a model, and the files that they are written to."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
from numpy.lib.format import write_array

from trainer.commands.predict.inputs import InputFile
from trainer.data.readers.arrow_tables import pyarrow
from trainer.loggers.terminal import Terminal
from trainer.service.engine import Engine, Tensors
from trainer.utils.text import harmless_cell

FIRST = ("file", "row", "label", "label_name", "scores", "outputs")  # columns, before others that a model has
MAX_CSV_COLUMNS = 1_000  # of an output: spreadsheets take 16,384 in all


@dataclass(frozen=True)
class Predictions:
    """A row for each example.

    Attributes:
        columns: by name: the `file` and the `row` in it, and the outputs of the model, [N, ...].
        label_names: names of the classes, by label; empty if they have none.
    """

    columns: Mapping[str, np.ndarray]
    label_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.columns["row"])

    def flat(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield columns of one number or text each; those of scores are named like their classes."""
        for name, values in self.columns.items():
            wide = values.reshape(len(values), -1)
            if values.ndim == 1:
                yield name, values
                continue
            names = self.label_names if len(self.label_names) == wide.shape[1] else map(str, range(wide.shape[1]))
            yield from ((f"{name}_{part}", column) for part, column in zip(names, wide.T, strict=True))


def predict(
    engine: Engine, files: Sequence[InputFile], label_names: Sequence[str], batch_size: int, terminal: Terminal
) -> Predictions:
    """Predict the examples of files.

    Args:
        engine: computes the model.
        files: the examples.
        label_names: names of the classes, by label.
        batch_size: examples that are computed together.
        terminal: displays the progress.

    Raises:
        ValueError: the model refuses an example, or its outputs differ in shape between batches.
    """
    parts, done, total = list[Tensors](), 0, sum(map(len, files))
    try:
        for file in files:
            for inputs in file.batches(batch_size):
                parts.append(_answer(engine, inputs, file, done))
                done += len(next(iter(inputs.values())))
                if monotonic() >= terminal.next_refresh:
                    terminal.progress(done / total, f"{done / total:6.1%}  {file.names[0]}")
    finally:
        terminal.close()
    found = {name: _concatenate(name, [part[name] for part in parts]) for name in parts[0]}
    columns = {
        "file": np.array([name for file in files for name in file.names]),
        "row": np.array([row for file in files for row in file.rows], np.int64),
        **found,
    }
    label = columns.get("label")
    if label_names and label is not None and label.ndim == 1:
        columns["label_name"] = np.array(label_names)[label]
    ordered = [name for name in FIRST if name in columns]
    return Predictions({name: columns[name] for name in (*ordered, *(columns.keys() - set(FIRST)))}, label_names)


def _answer(engine: Engine, inputs: Tensors, file: InputFile, row: int) -> Tensors:
    try:
        return engine.run(inputs)
    except ValueError as error:
        raise ValueError(f"{file.names[0]}: the model refuses examples near row {row}: {error}") from error


def _concatenate(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(
            f"{name} is of another shape for longer examples, so that its rows make no table\n"
            "  give it examples of one length"
        )
    return np.concatenate(parts)


def to_csv(predictions: Predictions) -> bytes:
    """Return the predictions as CSV, with a column for each number.

    Raises:
        ValueError: there are too many columns.
    """
    for name, values in predictions.columns.items():
        if (width := values[0].size) > MAX_CSV_COLUMNS:
            raise ValueError(
                f"{name} has {width:,} numbers a row, and {MAX_CSV_COLUMNS:,} are columns of a CSV file at most\n"
                "  write a .parquet or .npz file"
            )
    columns = dict(predictions.flat())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    # As text, numpy's numbers have the digits of their own precision.
    cells = (map(harmless_cell if column.dtype.kind == "U" else str, column) for column in columns.values())
    writer.writerows([list(map(harmless_cell, columns)), *zip(*cells, strict=True)])
    return text.getvalue().encode()


def to_parquet(predictions: Predictions) -> bytes:
    """Return the predictions as Parquet; what has several numbers a row is a list in it."""
    arrow = pyarrow()
    arrays = {name: _arrow_array(arrow, values) for name, values in predictions.columns.items()}
    content = io.BytesIO()
    arrow.parquet.write_table(arrow.table(arrays), content)
    return content.getvalue()


def _arrow_array(arrow: Any, values: np.ndarray) -> Any:
    """Return an Arrow array of values [N, ...], nested as they are."""
    array = arrow.array(values.ravel())
    for size in reversed(values.shape[1:]):
        array = arrow.FixedSizeListArray.from_arrays(array, size)
    return array


def to_npz(predictions: Predictions) -> bytes:
    """Return the predictions as arrays of numpy, which are loaded without unpickling."""
    content = io.BytesIO()
    with ZipFile(content, "w", ZIP_DEFLATED) as archive:  # as numpy.savez, which has an argument `file` of its own
        for name, values in predictions.columns.items():
            with archive.open(f"{name}.npy", "w") as member:
                write_array(member, values, allow_pickle=False)
    return content.getvalue()


FORMATS: dict[str, Callable[[Predictions], bytes]] = {".csv": to_csv, ".parquet": to_parquet, ".npz": to_npz}
