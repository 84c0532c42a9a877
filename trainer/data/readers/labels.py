"""Targets and owners of examples, as numbers from 0 on where they are labels, with their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.sources.column import INTEGERS, NUMBERS, TEXTS, NamedColumn

Classes = int | list[str] | None  # how many there are; or their names; or None: those that occur


@dataclass(frozen=True)
class EncodedColumns:
    """The values [N, ...] of each part of the data, and if they are labels, how many there are and their names."""

    parts: list[np.ndarray]
    number: int | None = None
    names: tuple[str, ...] = ()


def parse_targets(columns: Sequence[NamedColumn], classes: Classes, errors: list[str]) -> EncodedColumns:
    """The targets in these columns, one a part of the data; what is wrong with them is added to the faults.

    Integers and texts [N] are labels, int64; so are all numbers if `classes` are given. Others become float32.
    """
    columns = [column.vector() for column in columns]
    names = tuple(classes) if isinstance(classes, list) else ()
    if all(column.has_kind(TEXTS) for column in columns):
        names = names or tuple(np.unique(np.concatenate([column.values for column in columns])).tolist())
        return EncodedColumns([_indices_of(column, names, errors) for column in columns], len(names), names)
    if strange := [column for column in columns if not column.has_kind(NUMBERS)]:
        errors += [f"{column.description}, where targets are numbers or texts" for column in strange]
        return EncodedColumns([])
    if classes is None and not all(column.has_kind(INTEGERS) and column.values.ndim == 1 for column in columns):
        return EncodedColumns([column.finite(errors) for column in columns])
    number = classes if isinstance(classes, int) else len(names) or _largest(columns) + 1
    return EncodedColumns([_labels(column, number, errors) for column in columns], number, names)


def parse_client_ids(columns: Sequence[NamedColumn], errors: list[str]) -> EncodedColumns:
    """The owners in these columns, numbered by their sorted names; they are integers or texts."""
    columns = [column.vector() for column in columns]
    strange = [column for column in columns if not column.has_kind(INTEGERS + TEXTS) or column.values.ndim != 1]
    errors += [f"{column.description}, where an owner is a number or a text" for column in strange]
    if strange or not columns:
        return EncodedColumns([])
    names, numbers = np.unique(np.concatenate([column.values for column in columns]), return_inverse=True)
    ends = np.cumsum([len(column.values) for column in columns])[:-1]
    return EncodedColumns(np.split(numbers.astype(np.int64), ends), len(names), tuple(map(str, names.tolist())))


def _largest(columns: Sequence[NamedColumn]) -> int:
    return max(int(column.values.max(initial=0)) for column in columns)


def _labels(column: NamedColumn, classes: int, errors: list[str]) -> np.ndarray:
    """int64 [N]; whole numbers of any type are taken."""
    values = column.values
    if values.ndim != 1:
        errors.append(f"{column.description}, where a label is one number an example")
        return values
    with np.errstate(invalid="ignore"):
        labels = values.astype(np.int64)
    bad = (labels != values) | (labels < 0) | (labels >= classes)
    if bad.any():
        errors.append(column.error(bad, f"outside 0..{classes - 1}, such as {values[bad.argmax()]}"))
    return labels


def _indices_of(column: NamedColumn, names: Sequence[str], errors: list[str]) -> np.ndarray:
    """The place of each text among the names, int64 [N]."""
    found, inverse = np.unique(column.values, return_inverse=True)
    places = {name: place for place, name in enumerate(names)}
    labels = np.array([places.get(name, -1) for name in found.tolist()], np.int64)[inverse]
    if (bad := labels < 0).any():
        errors.append(
            column.error(bad, f"none of the classes {', '.join(names)}, such as {column.values[bad.argmax()]}")
        )
    return labels
