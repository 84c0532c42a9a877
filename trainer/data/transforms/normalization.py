"""Numbers brought to a common scale, channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from trainer.data.transforms.base import Batch, Examples


def _column(values: Sequence[float] | Tensor, inputs: Tensor) -> Tensor:
    """The values [C] beside the channels, the second dimension, of inputs [B, C, ...]."""
    return torch.as_tensor(values, dtype=inputs.dtype, device=inputs.device).view(-1, *[1] * (inputs.dim() - 2))


def _fault(inputs: Tensor) -> str:
    if inputs.dim() < 2 or not inputs.is_floating_point():
        return f"inputs of shape {list(inputs.shape)} and type {inputs.dtype} have no channels of numbers to scale"
    return ""


def _sums(inputs: Tensor) -> Tensor:
    """n, sum x and sum x^2 of each channel, float64 [3, C] on the CPU."""
    columns = inputs.transpose(0, 1).flatten(1).double()
    count = torch.full_like(columns[:, 0], columns.shape[1])
    return torch.stack((count, columns.sum(1), columns.square().sum(1))).cpu()


class Normalise:
    """(x - mean) / std with given numbers, one a channel, or one for all."""

    is_random = False

    def __init__(self, mean: float | list[float], std: float | list[float]):
        self.mean = [mean] if isinstance(mean, int | float) else list(mean)
        self.std = [std] if isinstance(std, int | float) else list(std)
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ValueError(f"mean={mean} std={std}\n  valid: as many of both, and each std above 0")

    def __call__(self, batch: Batch) -> Examples:
        mean, std = _column(self.mean, batch.inputs), _column(self.std, batch.inputs)
        return (batch.inputs - mean) / std, batch.targets

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if fault := _fault(inputs):
            return fault
        if len(self.mean) not in (1, inputs.shape[1]):
            return f"{len(self.mean)} means for {inputs.shape[1]} channels: give one for each, or one for all"
        return ""


class Standardise:
    """(x - mean) / std with the mean and standard deviation of each channel over the training examples.

    They are made of sums, n, sum x and sum x^2 in float64, that silos tell each other: no example leaves its silo.
    Channels that never change are only centred.
    """

    is_random = False

    def __init__(self):
        self.mean = self.std = torch.empty(0)

    @property
    def is_fitted(self) -> bool:
        return len(self.mean) > 0

    def __call__(self, batch: Batch) -> Examples:
        return (batch.inputs - _column(self.mean, batch.inputs)) / _column(self.std, batch.inputs), batch.targets

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        return _fault(inputs)

    def fit(self, batches: Iterable[Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Takes the statistics of these batches [B, C, ...], one at least, and of what other ranks add in `total`."""
        count, first, second = total(torch.stack([_sums(inputs) for inputs in batches]).sum(0))
        self.mean = first / count
        variance = (second / count - self.mean.square()).clamp_(min=0)
        self.std = torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))
