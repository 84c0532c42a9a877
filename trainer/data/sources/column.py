"""Columns of a data set, one entry per example, and the checks on their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor

from trainer.tasks.base import IGNORED
from trainer.utils.tensor_trees import Tree, map_tensors
from trainer.utils.text import format_value

INTEGERS, NUMBERS, TEXTS = "bui", "buif", "UT"  # kinds of numpy dtypes


@dataclass(frozen=True)
class NamedColumn:
    """An array [N, ...], one row per example, with its name in the file."""

    name: str
    values: np.ndarray

    def has_kind(self, kinds: str) -> bool:
        """Return whether the dtype is of one of these kinds."""
        return self.values.dtype.kind in kinds

    @property
    def description(self) -> str:
        """Name, dtype and shape, for error messages."""
        return f"{self.name}: {self.values.dtype} {list(self.values.shape)}"

    def squeeze(self) -> NamedColumn:
        """Return [N, 1] as [N], any other shape unchanged."""
        values = self.values
        return NamedColumn(self.name, values[:, 0]) if values.ndim == 2 and values.shape[1] == 1 else self

    def error(self, bad: np.ndarray, problem: str) -> str:
        """Return the message for the examples marked in `bad` (bool [N])."""
        return f"{self.name}: {bad.sum()} of {len(bad)} examples are {problem}; the first is example {bad.argmax()}"

    def as_float32(self, errors: list[str]) -> np.ndarray:
        """Return the numbers as float32; append an error where they are not finite."""
        with np.errstate(over="ignore"):
            values = self.values.astype(np.float32)
        bad = np.asarray((~np.isfinite(values)).any(axis=tuple(range(1, values.ndim))))
        if bad.any():
            errors.append(self.error(bad, "missing (NaN) or not finite in float32"))
        return values


def compose_texts(texts: np.ndarray) -> np.ndarray:
    """Return texts in the composed form of Unicode, in which é is one character however it was written."""
    distinct, inverse = np.unique(texts, return_inverse=True)
    return np.array([normalize("NFC", text) for text in distinct.tolist()], np.str_)[inverse]


def as_tensor(values: np.ndarray) -> Tensor:
    """Return the array as a tensor; copy it only if it is read-only."""
    return torch.from_numpy(np.require(values, requirements="W"))


def check_not_empty(examples: int) -> None:
    """Raise ValueError for a data set without examples."""
    if examples == 0:
        raise ValueError("the data set is empty: training and evaluation need at least one example")


def integer_column(name: str, values: np.ndarray | None, examples: int) -> np.ndarray | None:
    """Return the argument `name` as int64 [examples], None for None; raise ValueError for another shape or dtype."""
    if values is None:
        return None
    column = np.asarray(values)
    if column.shape != (examples,) or not np.issubdtype(column.dtype, np.integer):
        raise ValueError(
            f"{name}= must be one integer for each of {examples} examples; got {column.dtype} {list(column.shape)}"
        )
    return column.astype(np.int64)


def select_columns(
    rows: np.ndarray, names: Sequence[str], wanted: Sequence[str] | Sequence[int] | None, key: str
) -> np.ndarray:
    """Return the columns of rows [N, D] by the names of the columns that they were made of, or by their numbers.

    Raises:
        ValueError: there is no such column; the message begins with `key`.
    """
    if wanted is None:
        return rows
    called = [(number, *names[number : number + 1]) for number in range(rows.shape[1])]
    found = {name: [number for number, own in enumerate(called) if name in own] for name in wanted}
    if missing := [name for name, columns in found.items() if not columns]:
        numbers = f"the numbers 0 to {rows.shape[1] - 1}"
        valid = ", ".join(dict.fromkeys(names)) + f"; or {numbers}" if names else numbers
        raise ValueError(f"{key}={format_value(list(wanted))}: there is no column {missing[0]}\n  valid: {valid}")
    return rows[:, [column for columns in found.values() for column in columns]]


def as_targets(targets: Tree) -> Tree:
    """Return integers of any width as int64, which losses take; other targets unchanged."""
    return map_tensors(lambda tensor: tensor.long() if is_integer(tensor) else tensor, targets)


def is_integer(values: Tensor) -> bool:
    """Return whether the values are integers, other than booleans."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def first_outside(targets: Tree, classes: int) -> tuple[int, int] | None:
    """Return the row and the value of the first integer target [N, ...] outside the classes; None without one.

    Of several targets of an example, -100 marks those that torch's losses leave out, and 0 and 1 may stand for absent
    and present. Of a tree of targets only its task knows which are labels.
    """
    if not isinstance(targets, Tensor):
        return None
    values, limit = targets.numpy(), classes if targets.ndim == 1 else max(classes, 2)
    if not is_integer(targets) or not values.size or (values.min() >= 0 and values.max() < limit):
        return None
    is_outside = (values < 0) | (values >= limit)
    if values.ndim > 1:
        is_outside &= values != IGNORED
    index = np.unravel_index(is_outside.argmax(), is_outside.shape)
    return (int(index[0]), int(values[index])) if is_outside[index] else None


def label_column(targets: Tree) -> np.ndarray | None:
    """Return the targets as labels, int64 [N], if they are a vector of integers."""
    if not (isinstance(targets, Tensor) and is_integer(targets) and targets.ndim == 1):
        return None
    return targets.to("cpu", torch.int64).numpy()
