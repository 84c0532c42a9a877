"""Data sets that Hugging Face's `datasets` has saved to disk, read without it: folders of Arrow streams and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.data.readers.arrow_tables import ColumnNames, Names, make_splits_from_tables, pyarrow
from trainer.data.readers.cache import naming_file_in_errors
from trainer.data.readers.labels import Classes
from trainer.data.sources.base import DataSplits

TEST_NAMES = ("test", "validation", "valid", "val")
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def saved_dataset(
    path: str | Path,
    targets: str | None = "label",
    inputs: Names = None,
    owners: str | None = None,
    weights: str | None = None,
    classes: Classes = None,
    test: float = 0.1,
) -> DataSplits:
    """What `save_to_disk` of a Dataset or a DatasetDict left in the folder `path`, in memory.

    Of a DatasetDict `train` is trained on, and `test`, or else `validation`, is the test set; without them it is the
    fraction `test` of the examples, drawn. `inputs` is a column, or several of numbers; None: all but the others.
    Without `targets` the inputs are rows of tokens. Classes are those of a ClassLabel, if they are not told. What
    columns may hold is said at `make_splits_from_tables`. Raises one ValueError with all that is wrong with the files.
    """
    path = Path(path).expanduser()
    with naming_file_in_errors(path):
        train, held = _folders(path)
        known = _class_names(train, targets) if classes is None else classes
        tables = _table(train), _table(held) if held else test
        return make_splits_from_tables(*tables, ColumnNames(inputs, targets, owners, weights), known)


def _folders(path: Path) -> tuple[Path, Path | None]:
    """Where the training and the test set are."""
    if (path / "state.json").is_file():
        return path, None
    if not (path / "dataset_dict.json").is_file():
        raise ValueError(
            f"{path.absolute()} holds neither a state.json nor a dataset_dict.json.\n"
            "it is a folder to which a Dataset or a DatasetDict was saved, by save_to_disk"
        )
    names = _json(path / "dataset_dict.json")["splits"]
    train = "train" if "train" in names else names[0]
    held = next((name for name in TEST_NAMES if name in names and name != train), None)
    return path / train, path / held if held else None


def _table(folder: Path) -> Any:
    """All rows of a Dataset, memory-mapped. ValueError with the faults of all its files."""
    arrow, state, tables, errors = pyarrow(), _json(folder / "state.json"), [], []
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder.name}: its rows are chosen by an index. Save flatten_indices() of it")
    for name in [entry["filename"] for entry in state["_data_files"]]:
        try:
            if not _is_complete_stream(folder / name):
                raise ValueError("cut short")
            tables.append(arrow.ipc.open_stream(arrow.memory_map(str(folder / name))).read_all())
        except (OSError, ValueError, arrow.ArrowException) as error:
            errors.append(f"{folder.name}/{name}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}")
    if errors:
        raise ValueError("\n".join(errors))
    return arrow.concat_tables(tables)


def _is_complete_stream(path: Path) -> bool:
    """Whether the stream has its end: one that is cut between two batches is readable, and has fewer rows."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - len(END_OF_STREAM), 0))
        return file.read() == END_OF_STREAM


def _class_names(folder: Path, targets: str | None) -> Classes:
    """The names of the classes, if the column is a ClassLabel."""
    features = _json(folder / "dataset_info.json").get("features") or {}
    return features.get(targets, {}).get("names") if targets else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} of {path.parent.name}/ cannot be read: {error}") from error
