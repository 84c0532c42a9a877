"""From the columns of a file to a data set: what they may hold, and all that is wrong with them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.readers.labels import Classes, parse_client_ids, parse_targets
from trainer.data.readers.test_split import test_fraction_errors, test_mask
from trainer.data.sources.base import DataSplits, Source, TensorSource
from trainer.data.sources.column import INTEGERS, NUMBERS, NamedColumn, as_tensor
from trainer.data.sources.example_weights import parse_weights
from trainer.data.sources.pixels import ImageSource, as_pixels


@dataclass(frozen=True)
class ExampleColumns:
    """The examples of a part of a file. Targets, owners and weights [N, 1] are taken for [N]."""

    inputs: NamedColumn
    targets: NamedColumn
    client_ids: NamedColumn | None = None
    weights: NamedColumn | None = None


def make_splits(
    train: ExampleColumns, test: ExampleColumns | float, classes: Classes = None, found: Sequence[str] = ()
) -> DataSplits:
    """The data set of these columns; `test` is a part of its own, or the fraction of `train` that becomes one.

    inputs   numbers become float32, integers int64; uint8 [N, H, W], [N, C, H, W] or [N, H, W, C] are images: float32
             [N, C, H, W] in [0, 1]; a single number an example, [N], becomes float32 [N, 1]
    targets  integers or texts [N] are labels: 0 .. classes - 1, or the places of their names in `classes`, or else
             among those that occur, sorted; other numbers become float32
    owners   integers or texts: natural clients
    weights  numbers from 0, not all of them 0; asked of `train` alone

    Raises one ValueError with all that is wrong: kinds, shapes, lengths, labels out of range, NaN and infinity, after
    what was `found` wrong before.
    """
    parts = [train, test] if isinstance(test, ExampleColumns) else [train]
    errors = [*found, *(fault for part in parts for fault in _length_errors(part))]
    inputs = [_inputs(part.inputs, errors) for part in parts]
    if len({array.shape[1:] for array in inputs}) > 1:
        errors.append(f"the examples have different shapes: {', '.join(part.inputs.description for part in parts)}")
    targets = parse_targets([part.targets for part in parts], classes, errors)
    owners = parse_client_ids([part.client_ids for part in parts if part.client_ids], errors)
    weights = parse_weights(train.weights, errors)
    if not isinstance(test, ExampleColumns):
        errors += test_fraction_errors(test)
    if errors:
        raise ValueError("\n".join(errors))
    arrays = list(zip(inputs, targets.parts, owners.parts or [None] * len(parts), strict=True))
    if not isinstance(test, ExampleColumns):
        held = test_mask(len(inputs[0]), test, arrays[0][2])
        arrays = [_rows(arrays[0], ~held), _rows(arrays[0], held)]
        weights = weights[~held] if weights is not None else None
    return DataSplits(_source(*arrays[0]), _source(*arrays[1]), targets.number, owners.names, targets.names, weights)


Part = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _rows(part: Part, rows: np.ndarray) -> Part:
    inputs, targets, owners = part
    return inputs[rows], targets[rows], owners[rows] if owners is not None else None


def _source(inputs: np.ndarray, targets: np.ndarray, client_ids: np.ndarray | None) -> Source:
    kind = ImageSource if inputs.dtype == np.uint8 else TensorSource
    return kind(as_tensor(inputs), as_tensor(targets), client_ids)


def _length_errors(part: ExampleColumns) -> Iterator[str]:
    columns = [part.inputs, part.targets, *filter(None, (part.client_ids, part.weights))]
    if len({len(column.values) for column in columns}) > 1:
        yield "lengths differ: " + ", ".join(f"{len(column.values)} {column.name}" for column in columns)
    elif len(part.inputs.values) == 0:
        yield f"{part.inputs.name}: not a single example"


def _inputs(column: NamedColumn, errors: list[str]) -> np.ndarray:
    """float32 or int64 [N, ...]; uint8 [N, C, H, W] of images."""
    values = column.values
    if not column.has_kind(NUMBERS):
        errors.append(f"{column.description}, where inputs are numbers")
        return values
    if values.dtype == np.uint8 and values.ndim > 2:
        try:
            return as_pixels(values)
        except ValueError as error:
            errors.append(f"{column.name}: {error}")
            return values
    if column.has_kind(INTEGERS) and values.ndim > 1:
        return values.astype(np.int64)
    return column.finite(errors).reshape(len(values), *(values.shape[1:] or [1]))
