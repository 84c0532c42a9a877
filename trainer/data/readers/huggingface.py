"""Reader of data sets that Hugging Face's `datasets` has saved to disk; needs pyarrow alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.data.readers.arrow_tables import Names, make_splits_from_tables, pyarrow
from trainer.data.readers.cache import name_file_in_errors
from trainer.data.readers.columns import Classes
from trainer.data.readers.test_split import held_out_names
from trainer.data.sources.base import DataSplits
from trainer.utils.errors import raise_errors

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def saved_dataset(
    path: str | Path,
    targets: str | None = "label",
    inputs: Names = None,
    client_ids: str | None = None,
    weights: str | None = None,
    classes: Classes = None,
    test: float = 0.1,
) -> DataSplits:
    """Read into memory what `save_to_disk` of a Dataset or a DatasetDict has written.

    Of a DatasetDict, `train`, `test` and `validation` are the parts. Without `test`, `validation` is the test set.

    Args:
        path: the folder.
        targets: column of the targets; None if the inputs are rows of tokens.
        inputs: one column, or several columns of numbers; None for all columns with no other role.
        client_ids: column of the natural clients.
        weights: column of the weights of the training examples.
        classes: number or names of the classes; None for those of a ClassLabel column, or those that occur.
        test: fraction of the examples to draw as the test set, if the data set has none.

    Raises:
        ValueError: lists every problem with the files; see `make_splits_from_tables`.
    """
    path = Path(path).expanduser()
    with name_file_in_errors(path):
        train, test_folder, validation = _split_folders(path)
        classes = _class_names(train, targets) if classes is None else classes
        tables = _read_table(train), _read_table(test_folder) if test_folder else test
        wanted = {"inputs": inputs, "targets": targets, "client_ids": client_ids, "weights": weights}
        return make_splits_from_tables(*tables, wanted, classes, _read_table(validation) if validation else None)


def _split_folders(path: Path) -> tuple[Path, Path | None, Path | None]:
    """Return the folders of the training, the test and the validation set."""
    if (path / "state.json").is_file():
        return path, None, None
    if not (path / "dataset_dict.json").is_file():
        raise ValueError(
            f"{path.absolute()} has neither a state.json nor a dataset_dict.json.\n"
            "valid: a folder written by save_to_disk of a Dataset or a DatasetDict"
        )
    names = _read_json(path / "dataset_dict.json")["splits"]
    train = "train" if "train" in names else names[0]
    test, validation = held_out_names([name for name in names if name != train])
    return path / train, path / test if test else None, path / validation if validation else None


def _read_table(folder: Path) -> Any:
    """Return all rows of a Dataset, memory-mapped; raise ValueError with the errors of all its files."""
    arrow, state, tables, errors = pyarrow(), _read_json(folder / "state.json"), [], []
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder.name}: its rows are selected by an index. Save flatten_indices() of it")
    for name in [entry["filename"] for entry in state["_data_files"]]:
        try:
            if not _is_complete_stream(folder / name):
                raise ValueError("cut short")
            tables.append(arrow.ipc.open_stream(arrow.memory_map(str(folder / name))).read_all())
        except (OSError, ValueError, arrow.ArrowException) as error:
            errors.append(f"{folder.name}/{name}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}")
    raise_errors(errors)
    return arrow.concat_tables(tables)


def _is_complete_stream(path: Path) -> bool:
    """Return whether the stream has its end marker. One cut between two batches is readable, with fewer rows."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - len(END_OF_STREAM), 0))
        return file.read() == END_OF_STREAM


def _class_names(folder: Path, targets: str | None) -> Classes:
    """Return the names of the classes if the column is a ClassLabel."""
    features = _read_json(folder / "dataset_info.json").get("features") or {}
    return features.get(targets, {}).get("names") if targets else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} of {path.parent.name}/ cannot be read: {error}") from error
