"""A column of a file, and what may be wrong with its values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

INTEGERS, NUMBERS, TEXTS = "bui", "buif", "UT"  # kinds of numpy's dtypes


def as_tensor(values: np.ndarray) -> Tensor:
    """The array as a tensor, copied only where it must not be written to."""
    return torch.from_numpy(np.require(values, requirements="W"))


@dataclass(frozen=True)
class NamedColumn:
    """An array [N, ...], a row an example, and how it is called in its file."""

    name: str
    values: np.ndarray

    def has_kind(self, kinds: str) -> bool:
        """Whether the values are of one of these kinds."""
        return self.values.dtype.kind in kinds

    @property
    def description(self) -> str:
        """The column in a word for people."""
        return f"{self.name}: {self.values.dtype} {list(self.values.shape)}"

    def vector(self) -> NamedColumn:
        """[N, 1] as [N]; others as they are."""
        values = self.values
        return NamedColumn(self.name, values[:, 0]) if values.ndim == 2 and values.shape[1] == 1 else self

    def error(self, bad: np.ndarray, what: str) -> str:
        """What is said where the examples `bad` (bool [N]) are so."""
        return f"{self.name}: {bad.sum()} of {len(bad)} examples are {what}; the first is example {bad.argmax()}"

    def finite(self, errors: list[str]) -> np.ndarray:
        """The numbers as float32; where they are not finite is added to the faults."""
        with np.errstate(over="ignore"):
            values = self.values.astype(np.float32)
        bad = np.asarray((~np.isfinite(values)).any(axis=tuple(range(1, values.ndim))))
        if bad.any():
            errors.append(self.error(bad, "missing (NaN) or not finite in float32"))
        return values
