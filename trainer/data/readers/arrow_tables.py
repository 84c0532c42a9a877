"""Make a data set of Arrow tables: columns of numbers, lists of numbers, texts and images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trainer.data.readers.columns import Classes, Columns, make_inputs, make_splits
from trainer.data.readers.image_decoding import decode, shape_of
from trainer.data.readers.limits import check_unpacked_size
from trainer.data.readers.table_inputs import ColumnKinds
from trainer.data.sources.base import DataSplits, Source
from trainer.data.sources.column import NUMBERS, NamedColumn, as_tensor
from trainer.data.sources.table import TableEncoder
from trainer.utils.errors import raise_errors

Names = str | list[str] | None
DECODING_THREADS = 4
PANDAS_INDEX = re.compile(r"|Unnamed: 0|__index_level_\d+__")  # the first two of to_csv


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


def make_splits_from_tables(
    train: Any,
    test: Any | float,
    wanted: Mapping[str, Names],
    classes: Classes,
    validation: Any = None,
    kinds: ColumnKinds | None = None,
) -> DataSplits:
    """Make a data set of the wanted columns of Arrow tables.

    Columns are numbers; lists of numbers, nested or not, of the same lengths in every row; texts; or encoded images, as
    bytes or as a struct with a field `bytes`. `make_splits` converts them.

    Args:
        train: the table of the training examples.
        test: the table of the test examples, or the fraction of `train` to hold out.
        wanted: the names of the columns of each role; of the inputs several columns of numbers to stack, or None for
            all columns with no other role but the index of pandas.
        classes: number or names of the classes, or size of the vocabulary; None for those that occur.
        validation: the table of the validation examples; None: they are taken from the training examples.
        kinds: the columns of the inputs by kind, in place of those in `wanted`; None: `wanted` names them.

    Raises:
        ValueError: lists every problem: missing columns, nulls, unequal lists, and the errors of `make_splits`.
    """
    errors: list[str] = []
    tables = {"train": train, "test": test, "validation": validation}
    tables = {part: table for part, table in tables.items() if table is not None and not isinstance(table, float | int)}
    if kinds:
        return _make_splits_by_kind(tables, test, wanted, classes, kinds)
    wanted = {**wanted, "inputs": wanted["inputs"] or _input_names(train, wanted)}
    columns = {part: _read_columns(table, wanted, errors, part == "train") for part, table in tables.items()}
    return make_splits(**{"test": test, **columns}, classes=classes, found=errors)


def make_inputs_from_table(
    table: Any, wanted: Mapping[str, Names], kinds: ColumnKinds | None, encoder: TableEncoder | None
) -> Source:
    """Make a source of the inputs of an Arrow table, which need have no other columns; its targets are zeros.

    Args:
        table: the table.
        wanted: as for `make_splits_from_tables`.
        kinds: likewise.
        encoder: of the numbers and categories of `kinds`.

    Raises:
        ValueError: lists every problem with the inputs.
    """
    errors: list[str] = []
    if kinds is None:
        wanted = {**wanted, "inputs": wanted["inputs"] or _input_names(table, wanted)}
        return make_inputs(_read_inputs(table, wanted, errors), errors)
    inputs = kinds.read([table], pyarrow(), errors)
    raise_errors(errors)
    assert inputs is not None  # otherwise there were errors
    source: Any = inputs.source(np.arange(len(table)), torch.zeros(len(table), dtype=torch.int64), None)
    return source.encoded_by(encoder) if encoder else source


def _make_splits_by_kind(
    tables: Mapping[str, Any], test: Any | float, wanted: Mapping[str, Names], classes: Classes, kinds: ColumnKinds
) -> DataSplits:
    """Make a data set whose inputs are columns of several kinds."""
    errors, columns, first = [], {}, 0
    inputs = kinds.read(list(tables.values()), pyarrow(), errors)
    for part, table in tables.items():
        # The numbers of the rows stand for the inputs, until it is known which rows are of which source.
        rows = NamedColumn("rows", first + np.arange(len(table))[:, None])
        columns[part] = {"inputs": rows, **_read_roles(table, wanted, errors, part == "train")}
        first += len(table)

    def make_source(rows: np.ndarray, targets: np.ndarray | None, client_ids: np.ndarray | None) -> Source:
        assert inputs is not None and targets is not None  # otherwise there were errors
        return inputs.source(rows[:, 0], as_tensor(targets), client_ids)

    splits = make_splits(**{"test": test, **columns}, classes=classes, found=errors, make_source=make_source)
    assert inputs is not None
    return inputs.finish(splits)


def _input_names(train: Any, wanted: Mapping[str, Names]) -> list[str]:
    """Return the names of all columns of the training table with no other role."""
    others = [wanted[role] for role in ("targets", "client_ids", "weights")]
    return [name for name in _data_columns(train) if name not in others]


def _read_columns(table: Any, wanted: Mapping[str, Names], errors: list[str], is_train: bool) -> Columns:
    return {"inputs": _read_inputs(table, wanted, errors), **_read_roles(table, wanted, errors, is_train)}


def _read_roles(table: Any, wanted: Mapping[str, Names], errors: list[str], is_train: bool) -> Columns:
    """Return the columns other than inputs; only training examples have weights."""
    columns: Columns = {}
    for role in ("targets", "client_ids", "weights")[: 3 if is_train else 2]:
        before = len(errors)
        if name := wanted[role]:
            columns[role] = _read_column(table, str(name), errors)
        if role == "weights" and len(errors) > before:
            del columns[role]  # weights of 0 would be an error, too
    return columns


def _read_inputs(table: Any, wanted: Mapping[str, Names], errors: list[str]) -> NamedColumn:
    names = wanted["inputs"] or []
    if isinstance(names, str):
        return _read_column(table, names, errors)
    if len(names) == 1:
        return _read_column(table, names[0], errors)
    if not names:
        errors.append(f"there is no column of inputs; its columns: {', '.join(table.column_names)}")
    columns = []
    for column in [_read_column(table, name, errors) for name in names]:
        if column.values.ndim != 1 or not column.has_kind(NUMBERS):
            errors.append(
                f"{column.description}: several inputs must be one number per example each. "
                "Set data.inputs= to columns of numbers, or name each column by its kind in data.columns"
            )
        else:
            columns.append(np.nan_to_num(column.as_float32(errors)))
    return NamedColumn("inputs", np.stack(columns, axis=1) if columns else np.zeros((len(table), 1)))


def _data_columns(table: Any) -> list[str]:
    """Return the names of the columns without those that pandas writes for its index: they number the examples."""
    stored = (table.schema.pandas_metadata or {}).get("index_columns", [])
    return [name for name in table.column_names if name not in stored and not PANDAS_INDEX.fullmatch(name)]


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
        longest = pyarrow().compute.max(pyarrow().compute.utf8_length(values)).as_py() or 0
        check_unpacked_size(name, len(values) * longest * np.dtype("U1").itemsize)
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
    shape = (len(encoded), *shape_of(encoded, None, 3))
    check_unpacked_size(name, math.prod(shape))
    pixels = np.empty(shape, np.uint8)
    decode(encoded, pixels, False, DECODING_THREADS)
    return pixels
