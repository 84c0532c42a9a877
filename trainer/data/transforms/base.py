"""The Transform protocol, the batch that transforms work on, and their random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from trainer.utils.hardware import to_device
from trainer.utils.seeding import derive_seed, hash_numbers
from trainer.utils.tensor_trees import Tree

Examples = tuple[Tree, Tree]


@dataclass(frozen=True)
class Batch:
    """Inputs and targets on one device, with what random and mixing transforms need.

    Attributes:
        inputs: [B, ...]; of inputs with names those that the transform changes.
        targets: [B, ...].
        numbers: number of each example, int64 [B], the same on whatever rank the example is.
        members: ids of all examples of the client, int64 [n].
        key: hash of the seed, the epoch and the transform's name.
        fetch: returns the examples of other ids, after the transforms before this one.
        classes: number of classes of the data set; None if it has none.
    """

    inputs: Tensor
    targets: Tensor
    numbers: Tensor
    members: Tensor
    key: int
    fetch: Callable[[Tensor], Examples]
    classes: int | None = None

    def uniform(self, count: int = 1) -> Tensor:
        """Draw float64 [B, count] in [0, 1), a pure function of the seed, the epoch and the example."""
        return to_device(uniform(self.key, self.numbers, count), self.inputs.device)

    def integers(self, high: int, count: int = 1) -> Tensor:
        """Draw int64 [B, count] from 0 to high - 1 likewise."""
        return (self.uniform(count) * high).long()


class Transform(Protocol):
    """Abstract: transforms a whole batch.

    Attributes:
        is_random: whether it draws random numbers; evaluation skips random transforms.
    """

    is_random: bool

    def __call__(self, batch: Batch) -> Examples:
        """Return the new inputs and targets; leave those of the batch unchanged."""
        ...

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        """Return why examples like these [B, ...] cannot be transformed; empty if they can."""
        ...


@runtime_checkable
class FittedTransform(Transform, Protocol):
    """Abstract: a transform with statistics of the training examples."""

    def fit(self, batches: Iterable[Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Compute the statistics of batches of inputs [B, ...], of which `total` sums a tensor over all ranks.

        A rank without examples has one batch of none.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the statistics by name, as the run folder keeps them."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the statistics of a `state_dict`."""
        ...


def random_key(seed: int, epoch: int, name: str) -> int:
    """Return the key of a transform's random numbers in an epoch."""
    return derive_seed(seed, "preprocess", epoch, name)


def uniform(key: int, numbers: Tensor, count: int) -> Tensor:
    """Draw float64 [len(numbers), count] in [0, 1), each a hash of the key, the example's number and the column."""
    counters = numbers.cpu().long()[:, None] * count + torch.arange(count)
    return torch.from_numpy((hash_numbers(counters.numpy(), key) >> np.uint64(11)) * 2.0**-53)
