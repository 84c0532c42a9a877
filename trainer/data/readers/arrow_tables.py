"""From tables of Arrow to a data set: named columns of numbers, lists of numbers, texts and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trainer.data.readers.columns import ExampleColumns, make_splits
from trainer.data.readers.image_decoding import decode, shape_of
from trainer.data.readers.labels import Classes
from trainer.data.readers.test_split import test_fraction_errors, test_mask
from trainer.data.sources.base import DataSplits, SequenceWindows
from trainer.data.sources.column import INTEGERS, NamedColumn, as_tensor
from trainer.data.sources.example_weights import parse_weights

Names = str | list[str] | None
THREADS = 4  # that decode images


@dataclass(frozen=True)
class ColumnNames:
    """The columns that are wanted of a table.

    inputs   one column, or several of numbers, which are put side by side; None: all that are neither of the others
    targets  None: the inputs are tokens, and the targets those one place later
    client_ids   of the natural clients, or None
    weights  of the training examples, or None
    """

    inputs: Names = None
    targets: str | None = None
    client_ids: str | None = None
    weights: str | None = None


def pyarrow() -> Any:
    """The package pyarrow, with its modules. ValueError with the way to get it when it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("this needs the package pyarrow.\n  pip install pyarrow") from error
    return pyarrow


def make_splits_from_tables(train: Any, test: Any | float, wanted: ColumnNames, classes: Classes) -> DataSplits:
    """The data set of these columns of Arrow tables; `test` is one of its own, or the fraction of `train` held out.

    Columns are numbers; lists of numbers, of the same lengths in every row, nested or not; texts; or encoded images, as
    bytes or as a struct that has a field `bytes`. What can be made of them is said at `make_splits`. Raises one
    ValueError with all that is wrong: columns that are not there, nulls, unequal lists, and what `make_splits` refuses.
    """
    errors: list[str] = []
    parts = [train] if isinstance(test, float | int) else [train, test]
    inputs = [_inputs(table, wanted, errors) for table in parts]
    weights = _weights(train, wanted, errors)
    if wanted.targets is None:
        return _windows(inputs, weights, test, classes, errors)
    targets = [_column(table, wanted.targets, errors) for table in parts]
    owners = [_column(table, wanted.client_ids, errors) if wanted.client_ids else None for table in parts]
    columns = [ExampleColumns(*part) for part in zip(inputs, targets, owners, strict=True)]
    columns[0] = replace(columns[0], weights=weights)
    return make_splits(columns[0], test if isinstance(test, float | int) else columns[1], classes, errors)


def _windows(
    parts: Sequence[NamedColumn], weights: NamedColumn | None, test: Any | float, classes: Classes, errors: list[str]
) -> DataSplits:
    """Rows of tokens as windows that are one shorter."""
    strange = [column for column in parts if not column.has_kind(INTEGERS) or column.values.ndim != 2]
    errors += [f"{column.description}, where tokens are a list of integers in each row" for column in strange]
    largest = max(int(column.values.max(initial=0)) for column in parts) if not strange else 0
    number = classes if isinstance(classes, int) else largest + 1
    for column in parts if not strange else ():
        bad = np.asarray(((column.values < 0) | (column.values >= number)).any(1))
        if bad.any():
            errors.append(column.error(bad, f"with a token outside 0..{number - 1}"))
    if isinstance(test, float | int):
        errors += test_fraction_errors(test)
    counted = parse_weights(weights, errors)
    if errors:
        raise ValueError("\n".join(errors))
    rows = [as_tensor(column.values) for column in parts]
    if isinstance(test, float | int):
        held = torch.from_numpy(test_mask(len(rows[0]), test))
        rows = [rows[0][~held], rows[0][held]]
        counted = counted[(~held).numpy()] if counted is not None else None
    train, known = (SequenceWindows(part, part.shape[1] - 1) for part in rows)
    return DataSplits(train, known, number, weights=counted)


def _inputs(table: Any, wanted: ColumnNames, errors: list[str]) -> NamedColumn:
    others = {wanted.targets, wanted.client_ids, wanted.weights}
    names = wanted.inputs or [name for name in table.column_names if name not in others]
    if isinstance(names, str):
        return _column(table, names, errors)
    if len(names) == 1:
        return _column(table, names[0], errors)
    columns = [_column(table, name, errors) for name in names]
    joined = []
    for column in columns:
        if column.values.ndim != 1 or not column.has_kind("buif"):
            errors.append(
                f"{column.description}, where several inputs are a number each. Set data.inputs= to those that are"
            )
        else:
            joined.append(np.nan_to_num(column.finite(errors)))
    return NamedColumn("inputs", np.stack(joined, axis=1) if joined else np.zeros((len(table), 1)))


def _weights(table: Any, wanted: ColumnNames, errors: list[str]) -> NamedColumn | None:
    """The weights; None where none are wanted, or they cannot be read, for which there is a fault then."""
    before = len(errors)
    column = _column(table, wanted.weights, errors) if wanted.weights else None
    return column if len(errors) == before else None


def _column(table: Any, name: str, errors: list[str]) -> NamedColumn:
    """The column of this name as an array; zeros for one that cannot be read, whose faults are added."""
    try:
        if name not in table.column_names:
            raise ValueError(f"{name}: there is no such column; there are: {', '.join(table.column_names)}")
        return NamedColumn(name, _array(name, table.column(name).combine_chunks()))
    except ValueError as error:
        errors.append(str(error))
        return NamedColumn(name, np.zeros((len(table), 1), np.int64))


def _array(name: str, values: Any) -> np.ndarray:
    """An Arrow array as one of numpy, [N, ...]. Nulls among numbers become NaN."""
    arrow = pyarrow()
    kind = values.type
    if isinstance(kind, arrow.FixedShapeTensorType):
        return values.to_numpy_ndarray()
    if isinstance(kind, arrow.BaseExtensionType):
        return _array(name, values.storage)
    if arrow.types.is_dictionary(kind):
        return _array(name, values.dictionary_decode())
    if arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_boolean(kind):
        return _numbers(values)
    if values.null_count:
        bad = np.asarray(values.is_null())
        raise ValueError(NamedColumn(name, bad).error(bad, "null"))
    if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
        return np.asarray(values.to_pylist(), dtype=np.str_)
    if arrow.types.is_struct(kind) and any(field.name == "bytes" for field in kind):
        return _images(name, values.field("bytes"))
    if arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
        return _images(name, values)
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind) or arrow.types.is_fixed_size_list(kind):
        return _lists(name, values)
    raise ValueError(f"{name}: {kind}, where columns are numbers, lists of numbers, texts or images")


def _numbers(values: Any) -> np.ndarray:
    found = values.to_numpy(zero_copy_only=False)
    return found.astype(np.float32) if found.dtype == object else found  # booleans with nulls


def _lists(name: str, values: Any) -> np.ndarray:
    lengths = np.asarray(pyarrow().compute.list_value_length(values))
    if len(lengths) and (bad := lengths != lengths[0]).any():
        told = f"lists of another length than the first, {lengths[0]}, such as {lengths[bad.argmax()]}"
        raise ValueError(NamedColumn(name, lengths).error(bad, told))
    inner = _array(name, values.flatten())
    return inner.reshape(len(values), -1, *inner.shape[1:]) if len(values) else inner


def _images(name: str, values: Any) -> np.ndarray:
    encoded = {f"{name} of example {row}": value for row, value in enumerate(values.to_pylist())}
    if missing := [place for place, value in encoded.items() if value is None]:
        raise ValueError(f"{missing[0]} holds no bytes: save the images themselves, not their paths")
    pixels = np.empty((len(encoded), *shape_of(encoded, None, 3)), np.uint8)
    decode(encoded, pixels, False, THREADS)
    return pixels
