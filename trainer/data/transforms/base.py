"""What a transform is, and what it is told of the batch that it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.utils.hardware import to_device
from trainer.utils.seeding import derive_seed

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Batch:
    """Inputs [B, ...] and targets [B, ...] on one device, and what randomness and mixing need to know of them.

    numbers  of the examples, int64 [B]: an example has its own, whatever rank it is on
    members  of all examples of their client, int64 [n]
    key      of the seed, the epoch and the transform
    fetch    gives the examples of other ids as they would be here: after the transforms before this one
    classes  of the data set, if it has any
    """

    inputs: Tensor
    targets: Tensor
    numbers: Tensor
    members: Tensor
    key: int
    fetch: Callable[[Tensor], Examples]
    classes: int | None = None

    def uniform(self, count: int = 1) -> Tensor:
        """Numbers in [0, 1) of each example, float64 [B, count]: pure functions of (seed, epoch, example)."""
        numbers = uniform(self.key, self.numbers, count)
        return to_device(numbers, self.inputs.device)

    def integers(self, high: int, count: int = 1) -> Tensor:
        """Whole numbers from 0 to high - 1 of each example, int64 [B, count]."""
        return (self.uniform(count) * high).long()


class Transform(Protocol):
    """Abstract: changes a batch at once.

    is_random  whether it draws numbers: then it is of training alone, and evaluation leaves it out
    """

    is_random: bool

    def __call__(self, batch: Batch) -> Examples:
        """The inputs and targets as they shall be. Those of the batch are left as they are."""
        ...

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        """Why it cannot take examples like these [B, ...]; empty when it can."""
        ...


def random_key(seed: int, epoch: int, name: str) -> int:
    """The key of the draws of a transform in an epoch."""
    return derive_seed(seed, "preprocess", epoch, name)


def uniform(key: int, numbers: Tensor, count: int) -> Tensor:
    """float64 [len(numbers), count] in [0, 1), each a hash of the key, the example's number and its place.

    SplitMix64 (Steele, Lea and Flood 2014): a generator that can be asked for any number of its sequence, so no state
    is kept, and it does not matter who draws, and in what order. Arithmetic is that of int64, which wraps around.
    """
    places = numbers.cpu().long()[:, None] * count + torch.arange(count)
    mixed = (places + 1) * _signed(0x9E3779B97F4A7C15) + _signed(key)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    mixed = mixed ^ _shifted(mixed, 31)
    return _shifted(mixed, 11).double() * 2.0**-53


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value


def _shifted(values: Tensor, bits: int) -> Tensor:
    """To the right, with zeros coming in, as of unsigned numbers."""
    return (values >> bits) & (2 ** (64 - bits) - 1)
