"""Make a data set of the columns of a file, and report every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unicodedata import normalize

import numpy as np

from trainer.data.readers.test_split import draw_test_mask, test_fraction_errors
from trainer.data.sources.base import DataSplits, SequenceWindows, Source, TensorSource
from trainer.data.sources.column import INTEGERS, NUMBERS, TEXTS, NamedColumn, as_tensor, compose_texts
from trainer.data.sources.example_weights import parse_weights
from trainer.data.sources.pixels import ImageSource, as_channels_first
from trainer.utils.errors import raise_errors

Classes = int | list[str] | None  # their number, or their names, or None for those that occur

MakeSource = Callable[[np.ndarray, np.ndarray | None, np.ndarray | None], Source]

Part = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]  # inputs, targets, client ids

# The columns of one part of a file, by role: inputs, targets, client_ids, weights. All but the inputs may be [N, 1] for
# [N]. Without targets, the inputs are tokens.
Columns = dict[str, NamedColumn]


@dataclass(frozen=True)
class EncodedColumns:
    """Values [N, ...] of each part; for labels also the number of classes and their names."""

    parts: list[np.ndarray]
    number: int | None = None
    names: tuple[str, ...] = ()


def make_splits(
    train: Columns,
    test: Columns | float,
    classes: Classes = None,
    found: Sequence[str] = (),
    validation: Columns | None = None,
    make_source: MakeSource | None = None,
) -> DataSplits:
    """Make a data set of columns.

    Inputs: numbers become float32, integers int64. uint8 [N, H, W], [N, C, H, W] or [N, H, W, C] are images and become
    float32 [N, C, H, W] in [0, 1]. One number per example, [N], becomes float32 [N, 1].

    Targets: integers or texts [N] are labels. Integers are in 0 to classes - 1. Texts become their index in `classes`,
    or among the sorted texts that occur. Other numbers become float32. Without targets, inputs are rows of tokens below
    `classes`; they become windows that are one token shorter.

    Client ids are integers or texts. Weights are numbers from 0, not all of them 0, read from `train` alone.

    Args:
        train: the columns of the training examples.
        test: the columns of the test examples, or the fraction of `train` to hold out.
        classes: number or names of the classes, or size of the vocabulary; None for those that occur.
        found: errors found before, reported with the others.
        validation: the columns of the validation examples; None: they are taken from the training examples. Their
            classes must be among those of the others.
        make_source: makes a source of some of the parsed inputs, of their targets and client ids; None: one of arrays.

    Raises:
        ValueError: lists every problem with kinds, shapes, lengths, labels out of range, NaN and infinity.
    """
    known = [train, test] if isinstance(test, dict) else [train]
    parts = known if validation is None else [*known, validation]
    errors = [*found, *(error for part in parts for error in _length_errors(part))]
    columns = [part["inputs"] for part in parts]
    if "targets" in train:
        inputs = [_parse_inputs(column, errors) for column in columns]
        if len({array.shape[1:] for array in inputs}) > 1:
            errors.append(f"the examples have different shapes: {', '.join(column.description for column in columns)}")
        encoded = _parse_targets([part["targets"] for part in known], classes, errors)
        targets = encoded.parts
        if validation is not None:
            targets = [*targets, _parse_more_targets(validation["targets"], train["targets"], encoded, errors)]
    else:
        encoded = _parse_tokens(columns, classes, errors)
        inputs, targets = encoded.parts, [None] * len(parts)
    client_ids = _parse_client_ids([part["client_ids"] for part in parts if "client_ids" in part], errors)
    weights = parse_weights(train.get("weights"), errors)
    if not isinstance(test, dict):
        errors += test_fraction_errors(test)
    raise_errors(errors)
    arrays = list(zip(inputs, targets, client_ids.parts or [None] * len(parts), strict=True))
    if not isinstance(test, dict):
        is_test = draw_test_mask(len(inputs[0]), test, arrays[0][2])
        arrays[:1] = [_select(arrays[0], rows) for rows in (~is_test, is_test)]
        weights = weights[~is_test] if weights is not None else None
    made = [(make_source or _make_source)(*part) for part in arrays]
    splits = DataSplits(made[0], made[1], encoded.number, client_ids.names, encoded.names, weights)
    return splits.with_parts(*made)  # of which there are three with a validation set


def make_inputs(column: NamedColumn, found: Sequence[str] = ()) -> Source:
    """Make a source of inputs alone, converted as by `make_splits`; its targets are zeros.

    Args:
        column: the inputs.
        found: errors found before, reported with the others.

    Raises:
        ValueError: lists every problem with them.
    """
    errors = list(found)
    inputs = _parse_inputs(column, errors)
    raise_errors(errors)
    return _make_source(inputs, np.zeros(len(inputs), np.int64), None)


def _select(part: Part, rows: np.ndarray) -> Part:
    inputs, *others = part
    targets, client_ids = (None if column is None else column[rows] for column in others)
    return inputs[rows], targets, client_ids


def _make_source(inputs: np.ndarray, targets: np.ndarray | None, client_ids: np.ndarray | None) -> Source:
    if targets is None:
        return SequenceWindows(as_tensor(inputs), inputs.shape[1] - 1, client_ids)
    kind = ImageSource if inputs.dtype == np.uint8 else TensorSource
    return kind(as_tensor(inputs), as_tensor(targets), client_ids)


def _length_errors(part: Columns) -> Iterator[str]:
    if len({len(column.values) for column in part.values()}) > 1:
        yield "lengths differ: " + ", ".join(f"{len(column.values)} {column.name}" for column in part.values())
    elif len(part["inputs"].values) == 0:
        yield f"{part['inputs'].name}: there are no examples"


def _parse_tokens(columns: Sequence[NamedColumn], classes: Classes, errors: list[str]) -> EncodedColumns:
    """Check the tokens of each part, integers [N, length + 1]."""
    if invalid := [column for column in columns if not column.has_kind(INTEGERS) or column.values.ndim != 2]:
        errors += [f"{column.description}: tokens must be a list of integers in each row" for column in invalid]
        return EncodedColumns([])
    largest = max(int(column.values.max(initial=0)) for column in columns)
    vocabulary = classes if isinstance(classes, int) else largest + 1
    for column in columns:
        bad = np.asarray(((column.values < 0) | (column.values >= vocabulary)).any(1))
        if bad.any():
            errors.append(column.error(bad, f"with a token outside 0..{vocabulary - 1}"))
    return EncodedColumns([column.values for column in columns], vocabulary)


def _parse_inputs(column: NamedColumn, errors: list[str]) -> np.ndarray:
    """Return float32 or int64 [N, ...], or uint8 [N, C, H, W] for images."""
    values = column.values
    if not column.has_kind(NUMBERS):
        errors.append(f"{column.description}: inputs must be numbers")
        return values
    if values.dtype == np.uint8 and values.ndim > 2:
        try:
            return as_channels_first(values)
        except ValueError as error:
            errors.append(f"{column.name}: {error}")
            return values
    if column.has_kind(INTEGERS) and values.ndim > 1:
        return values.astype(np.int64)
    return column.as_float32(errors).reshape(len(values), *(values.shape[1:] or [1]))


def _parse_targets(columns: Sequence[NamedColumn], classes: Classes, errors: list[str]) -> EncodedColumns:
    """Parse the targets of each part: labels as int64, others as float32.

    Integers and texts [N] are labels. With `classes` given, all numbers are.
    """
    columns = [column.squeeze() for column in columns]
    names = tuple(classes) if isinstance(classes, list) else ()
    if all(column.has_kind(TEXTS) for column in columns):
        columns = [NamedColumn(column.name, compose_texts(column.values)) for column in columns]
        names = tuple(normalize("NFC", name) for name in names) or tuple(
            np.unique(np.concatenate([column.values for column in columns])).tolist()
        )
        return EncodedColumns([_index_texts(column, names, errors) for column in columns], len(names), names)
    if invalid := [column for column in columns if not column.has_kind(NUMBERS)]:
        errors += [f"{column.description}: targets must be numbers or texts" for column in invalid]
        return EncodedColumns([])
    if classes is None and not all(column.has_kind(INTEGERS) and column.values.ndim == 1 for column in columns):
        return EncodedColumns([column.as_float32(errors) for column in columns])
    largest = max(int(column.values.max(initial=0)) for column in columns)
    number = classes if isinstance(classes, int) else len(names) or largest + 1
    return EncodedColumns([_parse_labels(column, number, errors) for column in columns], number, names)


def _parse_more_targets(
    column: NamedColumn, train: NamedColumn, encoded: EncodedColumns, errors: list[str]
) -> np.ndarray:
    """Parse the targets of a further part as those of training were."""
    column = column.squeeze()
    if column.has_kind(TEXTS) != train.has_kind(TEXTS):
        errors.append(f"{column.description}: unlike the targets of training, {train.description}")
        return column.values
    if encoded.number is None:
        return column.as_float32(errors) if column.has_kind(NUMBERS) else column.values
    parsed = _parse_targets([column], list(encoded.names) or encoded.number, errors).parts
    return parsed[0] if parsed else column.values


def _parse_client_ids(columns: Sequence[NamedColumn], errors: list[str]) -> EncodedColumns:
    """Number the natural clients by their sorted ids, which are integers or texts."""
    columns = [column.squeeze() for column in columns]
    invalid = [column for column in columns if not column.has_kind(INTEGERS + TEXTS) or column.values.ndim != 1]
    errors += [f"{column.description}: client ids must be integers or texts, one per example" for column in invalid]
    if invalid or not columns:
        return EncodedColumns([])
    ids = [compose_texts(column.values) if column.has_kind(TEXTS) else column.values for column in columns]
    names, numbers = np.unique(np.concatenate(ids), return_inverse=True)
    ends = np.cumsum([len(column.values) for column in columns])[:-1]
    return EncodedColumns(np.split(numbers.astype(np.int64), ends), len(names), tuple(map(str, names.tolist())))


def _parse_labels(column: NamedColumn, classes: int, errors: list[str]) -> np.ndarray:
    """Return int64 [N]; whole numbers of any dtype are labels."""
    values = column.values
    if values.ndim != 1:
        errors.append(f"{column.description}: labels must be one number per example")
        return values
    with np.errstate(invalid="ignore"):
        labels = values.astype(np.int64)
    bad = (labels != values) | (labels < 0) | (labels >= classes)
    if bad.any():
        errors.append(column.error(bad, f"outside 0..{classes - 1}, such as {values[bad.argmax()]}"))
    return labels


def _index_texts(column: NamedColumn, names: Sequence[str], errors: list[str]) -> np.ndarray:
    """Return the index of each text among the names, int64 [N]."""
    texts, inverse = np.unique(column.values, return_inverse=True)
    indices = {name: index for index, name in enumerate(names)}
    labels = np.array([indices.get(text, -1) for text in texts.tolist()], np.int64)[inverse]
    if (bad := labels < 0).any():
        errors.append(
            column.error(bad, f"not among the classes {', '.join(names)}, such as {column.values[bad.argmax()]}")
        )
    return labels
