"""Readers of tables with named columns: Parquet, CSV and JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.data.readers.arrow_tables import Names, make_splits_from_tables, pyarrow
from trainer.data.readers.cache import name_file_in_errors
from trainer.data.readers.columns import Classes
from trainer.data.sources.base import DataSplits

Wanted = Mapping[str, Names]  # the names of the columns of each role

JSON_BLOCK_BYTES = 1 << 26  # a line must fit into a block of pyarrow's reader

ARGUMENTS = """
    Args:
        path: the file.
        targets: column of the targets; None if the inputs are rows of tokens.
        inputs: one column, or several columns of numbers; None for all columns with no other role.
        client_ids: column of the natural clients.
        weights: column of the weights of the training examples.
        classes: number or names of the classes; None for those that occur.
        test: fraction of the examples to draw as the test set.
        test_path: a file of test examples instead.

    Raises:
        ValueError: lists every problem with the file; see `make_splits_from_tables`.
    """


def _splits_reader(read_table: Callable[[Path, Wanted], Any]):
    """Decorate a function that reads a table to read a data set, with the arguments above."""

    def read_splits(
        path: str | Path,
        targets: str | None = "label",
        inputs: Names = None,
        client_ids: str | None = None,
        weights: str | None = None,
        classes: Classes = None,
        test: float = 0.1,
        test_path: str | Path | None = None,
    ) -> DataSplits:
        path = Path(path).expanduser()
        wanted = {"inputs": inputs, "targets": targets, "client_ids": client_ids, "weights": weights}
        with name_file_in_errors(path):
            test_table = _read(read_table, Path(test_path).expanduser(), wanted) if test_path is not None else test
            return make_splits_from_tables(_read(read_table, path, wanted), test_table, wanted, classes)

    read_splits.__name__ = read_splits.__qualname__ = read_table.__name__
    read_splits.__doc__ = f"{read_table.__doc__}\n{ARGUMENTS}"
    return read_splits


def _read(read_table: Callable[[Path, Wanted], Any], path: Path, wanted: Wanted) -> Any:
    arrow = pyarrow()
    try:
        return read_table(path, wanted)
    except (OSError, arrow.ArrowException) as error:
        kind, reason = read_table.__name__, str(error).splitlines()[0]
        raise ValueError(f"{path.absolute()} is not a {kind} file, or damaged: {reason}") from error


@_splits_reader
def parquet(path: Path, wanted: Wanted) -> Any:
    """Read columns of a Parquet file, or of all Parquet files in a folder, into memory."""
    parquet = pyarrow().parquet
    if wanted["inputs"] is None:
        return parquet.read_table(path)
    names = [name for each in wanted.values() for name in ([each] if isinstance(each, str) else each or [])]
    # Missing columns are reported later, with all other problems.
    present = parquet.ParquetDataset(path).schema.names
    return parquet.read_table(path, columns=[name for name in names if name in present])


@_splits_reader
def csv(path: Path, wanted: Wanted) -> Any:
    """Read columns of a CSV file, whose first line names them, into memory."""
    return pyarrow().csv.read_csv(path)


@_splits_reader
def jsonl(path: Path, wanted: Wanted) -> Any:
    """Read fields of a JSON lines file, one object per line, into memory."""
    json = pyarrow().json
    return json.read_json(path, json.ReadOptions(block_size=JSON_BLOCK_BYTES))
