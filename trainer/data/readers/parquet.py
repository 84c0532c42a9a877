"""Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.data.readers.arrow_tables import ColumnNames, Names, make_splits_from_tables, pyarrow
from trainer.data.readers.cache import naming_file_in_errors
from trainer.data.readers.labels import Classes
from trainer.data.sources.base import DataSplits


def parquet(
    path: str | Path,
    targets: str | None = "label",
    inputs: Names = None,
    owners: str | None = None,
    weights: str | None = None,
    classes: Classes = None,
    test: float = 0.1,
    test_path: str | Path | None = None,
) -> DataSplits:
    """The columns of a Parquet file, or of all in a folder, in memory.

    `inputs` is a column, or several of numbers; None: all but the others. Without `targets` the inputs are rows of
    tokens. The test set is the file `test_path`, or else the fraction `test` of the examples, drawn. What columns may
    hold is said at `make_splits_from_tables`. Raises one ValueError with all that is wrong with the file.
    """
    path, wanted = Path(path).expanduser(), ColumnNames(inputs, targets, owners, weights)
    with naming_file_in_errors(path):
        held = _table(Path(test_path).expanduser(), wanted) if test_path is not None else test
        return make_splits_from_tables(_table(path, wanted), held, wanted, classes)


def _table(path: Path, wanted: ColumnNames) -> Any:
    """The wanted columns, or all where they are not told."""
    arrow = pyarrow()
    inputs = [wanted.inputs] if isinstance(wanted.inputs, str) else wanted.inputs
    names = [*inputs, *filter(None, [wanted.targets, wanted.client_ids, wanted.weights])] if inputs else None
    try:
        there = arrow.parquet.ParquetDataset(path).schema.names
        return arrow.parquet.read_table(path, columns=names and [name for name in names if name in there])
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{path.absolute()} is no Parquet file, or damaged: {str(error).splitlines()[0]}") from error
