"""Make a data set of Arrow tables: columns of numbers, lists of numbers, texts and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trainer.data.readers.columns import Classes, ExampleColumns, make_splits
from trainer.data.readers.image_decoding import decode, shape_of
from trainer.data.readers.test_split import draw_test_mask, test_fraction_errors
from trainer.data.sources.base import DataSplits, SequenceWindows
from trainer.data.sources.column import INTEGERS, NUMBERS, NamedColumn, as_tensor
from trainer.data.sources.example_weights import parse_weights

Names = str | list[str] | None
DECODING_THREADS = 4


@dataclass(frozen=True)
class ColumnNames:
    """The columns of a table to read.

    Attributes:
        inputs: one column, or several columns of numbers to stack; None for all columns with no other role.
        targets: None if the inputs are tokens and the targets the same tokens shifted by one.
        client_ids: the natural clients; None if there are none.
        weights: the weights of the training examples; None for equal weights.
    """

    inputs: Names = None
    targets: str | None = None
    client_ids: str | None = None
    weights: str | None = None


def pyarrow() -> Any:
    """Import pyarrow with its modules; raise ValueError with the install command if it is missing."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.ipc
        import pyarrow.json
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("this needs the package pyarrow.\n  pip install pyarrow") from error
    return pyarrow


def make_splits_from_tables(train: Any, test: Any | float, wanted: ColumnNames, classes: Classes) -> DataSplits:
    """Make a data set of the wanted columns of Arrow tables.

    Columns are numbers; lists of numbers, nested or not, of the same lengths in every row; texts; or encoded images, as
    bytes or as a struct with a field `bytes`. `make_splits` converts them.

    Args:
        train: the table of the training examples.
        test: the table of the test examples, or the fraction of `train` to hold out.
        wanted: the columns to read.
        classes: number or names of the classes, or size of the vocabulary; None for those that occur.

    Raises:
        ValueError: lists every problem: missing columns, nulls, unequal lists, and the errors of `make_splits`.
    """
    errors: list[str] = []
    tables = [train] if isinstance(test, float | int) else [train, test]
    inputs = [_read_inputs(table, wanted, errors) for table in tables]
    weights = _read_weights(train, wanted, errors)
    if wanted.targets is None:
        return _make_windows(inputs, weights, test, classes, errors)
    targets = [_read_column(table, wanted.targets, errors) for table in tables]
    client_ids = [_read_column(table, wanted.client_ids, errors) if wanted.client_ids else None for table in tables]
    parts = [ExampleColumns(*part) for part in zip(inputs, targets, client_ids, strict=True)]
    parts[0] = replace(parts[0], weights=weights)
    return make_splits(parts[0], test if isinstance(test, float | int) else parts[1], classes, errors)


def _make_windows(
    parts: Sequence[NamedColumn], weights: NamedColumn | None, test: Any | float, classes: Classes, errors: list[str]
) -> DataSplits:
    """Make windows of rows of tokens; a window is one token shorter than its row."""
    invalid = [column for column in parts if not column.has_kind(INTEGERS) or column.values.ndim != 2]
    errors += [f"{column.description}: tokens must be a list of integers in each row" for column in invalid]
    largest = max(int(column.values.max(initial=0)) for column in parts) if not invalid else 0
    vocabulary = classes if isinstance(classes, int) else largest + 1
    for column in parts if not invalid else ():
        bad = np.asarray(((column.values < 0) | (column.values >= vocabulary)).any(1))
        if bad.any():
            errors.append(column.error(bad, f"with a token outside 0..{vocabulary - 1}"))
    if isinstance(test, float | int):
        errors += test_fraction_errors(test)
    parsed_weights = parse_weights(weights, errors)
    if errors:
        raise ValueError("\n".join(errors))
    rows = [as_tensor(column.values) for column in parts]
    if isinstance(test, float | int):
        is_test = torch.from_numpy(draw_test_mask(len(rows[0]), test))
        rows = [rows[0][~is_test], rows[0][is_test]]
        parsed_weights = parsed_weights[(~is_test).numpy()] if parsed_weights is not None else None
    train_windows, test_windows = (SequenceWindows(part, part.shape[1] - 1) for part in rows)
    return DataSplits(train_windows, test_windows, vocabulary, weights=parsed_weights)


def _read_inputs(table: Any, wanted: ColumnNames, errors: list[str]) -> NamedColumn:
    others = {wanted.targets, wanted.client_ids, wanted.weights}
    names = wanted.inputs or [name for name in table.column_names if name not in others]
    if isinstance(names, str):
        return _read_column(table, names, errors)
    if len(names) == 1:
        return _read_column(table, names[0], errors)
    columns = []
    for column in [_read_column(table, name, errors) for name in names]:
        if column.values.ndim != 1 or not column.has_kind(NUMBERS):
            errors.append(
                f"{column.description}: several inputs must be one number per example each. "
                "Set data.inputs= to columns of numbers"
            )
        else:
            columns.append(np.nan_to_num(column.as_float32(errors)))
    return NamedColumn("inputs", np.stack(columns, axis=1) if columns else np.zeros((len(table), 1)))


def _read_weights(table: Any, wanted: ColumnNames, errors: list[str]) -> NamedColumn | None:
    """Return the weights; None if there are none, or if they cannot be read, which appends an error."""
    before = len(errors)
    column = _read_column(table, wanted.weights, errors) if wanted.weights else None
    return column if len(errors) == before else None


def _read_column(table: Any, name: str, errors: list[str]) -> NamedColumn:
    """Return a column as an array; zeros for one that cannot be read, which appends an error."""
    try:
        if name not in table.column_names:
            raise ValueError(f"{name}: there is no such column; valid: {', '.join(table.column_names)}")
        return NamedColumn(name, _to_numpy(name, table.column(name).combine_chunks()))
    except ValueError as error:
        errors.append(str(error))
        return NamedColumn(name, np.zeros((len(table), 1), np.int64))


def _to_numpy(name: str, values: Any) -> np.ndarray:
    """Convert an Arrow array to numpy, [N, ...]. Nulls among numbers become NaN."""
    arrow = pyarrow()
    kind = values.type
    if isinstance(kind, arrow.FixedShapeTensorType):
        return values.to_numpy_ndarray()
    if isinstance(kind, arrow.BaseExtensionType):
        return _to_numpy(name, values.storage)
    if arrow.types.is_dictionary(kind):
        return _to_numpy(name, values.dictionary_decode())
    if arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_boolean(kind):
        numbers = values.to_numpy(zero_copy_only=False)
        return numbers.astype(np.float32) if numbers.dtype == object else numbers  # booleans with nulls are objects
    if values.null_count:
        bad = np.asarray(values.is_null())
        raise ValueError(NamedColumn(name, bad).error(bad, "null"))
    if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
        return np.asarray(values.to_pylist(), dtype=np.str_)
    if arrow.types.is_struct(kind) and any(field.name == "bytes" for field in kind):
        return _decode_images(name, values.field("bytes"))
    if arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
        return _decode_images(name, values)
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind) or arrow.types.is_fixed_size_list(kind):
        return _stack_lists(name, values)
    raise ValueError(f"{name}: {kind}; columns must be numbers, lists of numbers, texts or images")


def _stack_lists(name: str, values: Any) -> np.ndarray:
    lengths = np.asarray(pyarrow().compute.list_value_length(values))
    if len(lengths) and (bad := lengths != lengths[0]).any():
        problem = f"lists of another length than the first, {lengths[0]}, such as {lengths[bad.argmax()]}"
        raise ValueError(NamedColumn(name, lengths).error(bad, problem))
    inner = _to_numpy(name, values.flatten())
    return inner.reshape(len(values), -1, *inner.shape[1:]) if len(values) else inner


def _decode_images(name: str, values: Any) -> np.ndarray:
    encoded = {f"{name} of example {row}": value for row, value in enumerate(values.to_pylist())}
    if missing := [label for label, value in encoded.items() if value is None]:
        raise ValueError(f"{missing[0]} has no bytes: save the images themselves, not their paths")
    pixels = np.empty((len(encoded), *shape_of(encoded, None, 3)), np.uint8)
    decode(encoded, pixels, False, DECODING_THREADS)
    return pixels
