"""From the columns of a file to a data set: what they may hold, and all that is wrong with them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.readers.labels import Classes, owners_of, targets_of
from trainer.data.readers.test_split import cut_faults, held_out
from trainer.data.sources.base import Arrays, Source, Splits
from trainer.data.sources.column import INTEGERS, NUMBERS, Column, as_tensor
from trainer.data.sources.example_weights import weights_of
from trainer.data.sources.pixels import Pixels, as_pixels


@dataclass(frozen=True)
class Columns:
    """The examples of a part of a file. Targets, owners and weights [N, 1] are taken for [N]."""

    inputs: Column
    targets: Column
    owners: Column | None = None
    weights: Column | None = None


def splits_of(train: Columns, test: Columns | float, classes: Classes = None, found: Sequence[str] = ()) -> Splits:
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
    parts = [train, test] if isinstance(test, Columns) else [train]
    faults = [*found, *(fault for part in parts for fault in _length_faults(part))]
    inputs = [_inputs(part.inputs, faults) for part in parts]
    if len({array.shape[1:] for array in inputs}) > 1:
        faults.append(f"the examples have different shapes: {', '.join(part.inputs.told for part in parts)}")
    targets = targets_of([part.targets for part in parts], classes, faults)
    owners = owners_of([part.owners for part in parts if part.owners], faults)
    weights = weights_of(train.weights, faults)
    if not isinstance(test, Columns):
        faults += cut_faults(test)
    if faults:
        raise ValueError("\n".join(faults))
    arrays = list(zip(inputs, targets.parts, owners.parts or [None] * len(parts), strict=True))
    if not isinstance(test, Columns):
        held = held_out(len(inputs[0]), test, arrays[0][2])
        arrays = [_rows(arrays[0], ~held), _rows(arrays[0], held)]
        weights = weights[~held] if weights is not None else None
    return Splits(_source(*arrays[0]), _source(*arrays[1]), targets.number, owners.names, targets.names, weights)


Part = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _rows(part: Part, rows: np.ndarray) -> Part:
    inputs, targets, owners = part
    return inputs[rows], targets[rows], owners[rows] if owners is not None else None


def _source(inputs: np.ndarray, targets: np.ndarray, owners: np.ndarray | None) -> Source:
    kind = Pixels if inputs.dtype == np.uint8 else Arrays
    return kind(as_tensor(inputs), as_tensor(targets), owners)


def _length_faults(part: Columns) -> Iterator[str]:
    columns = [part.inputs, part.targets, *filter(None, (part.owners, part.weights))]
    if len({len(column.values) for column in columns}) > 1:
        yield "lengths differ: " + ", ".join(f"{len(column.values)} {column.name}" for column in columns)
    elif len(part.inputs.values) == 0:
        yield f"{part.inputs.name}: not a single example"


def _inputs(column: Column, faults: list[str]) -> np.ndarray:
    """float32 or int64 [N, ...]; uint8 [N, C, H, W] of images."""
    values = column.values
    if not column.is_of(NUMBERS):
        faults.append(f"{column.told}, where inputs are numbers")
        return values
    if values.dtype == np.uint8 and values.ndim > 2:
        try:
            return as_pixels(values)
        except ValueError as error:
            faults.append(f"{column.name}: {error}")
            return values
    if column.is_of(INTEGERS) and values.ndim > 1:
        return values.astype(np.int64)
    return column.finite(faults).reshape(len(values), *(values.shape[1:] or [1]))
