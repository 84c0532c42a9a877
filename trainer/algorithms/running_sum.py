"""The sum of the vectors of a silo's clients, without a copy for the last of them."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningSum:
    """Adds vectors. The last one stays where it is, which may be the model's own memory, until `detach`.

    A silo with one client thus sends its update from where it was made. Memory for sums is kept between rounds.
    """

    def __init__(self):
        self.last: Tensor | None = None
        self.total: Tensor | None = None
        self.has_total = False

    def clear(self) -> None:
        """Begin anew."""
        self.last, self.has_total = None, False

    def add(self, vector: Tensor) -> None:
        """Add a vector, which nobody may change until `detach` or `value`."""
        self.detach()
        self.last = vector

    def detach(self) -> None:
        """Move the sum into memory of its own, because that of the last vector is needed."""
        if self.last is None:
            return
        if self.total is None or len(self.total) != len(self.last):
            self.total = torch.empty_like(self.last)
        if self.has_total:
            self.total.add_(self.last)
        else:
            self.total.copy_(self.last)
        self.last, self.has_total = None, True

    def value(self) -> Tensor | None:
        """Return the sum in place, for the caller to change; None if nothing was added."""
        if self.has_total:
            self.detach()
        return self.total if self.has_total else self.last

    def load(self, vector: Tensor) -> None:
        """Set the sum to a saved one."""
        self.last, self.total, self.has_total = None, vector, True
