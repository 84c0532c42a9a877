"""Transforms that normalize channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from trainer.data.transforms.base import Batch, Examples


def _per_channel(values: Sequence[float] | Tensor, inputs: Tensor) -> Tensor:
    """Reshape values [C] to broadcast along the channels, the second dimension, of inputs [B, C, ...]."""
    return torch.as_tensor(values, dtype=inputs.dtype, device=inputs.device).view(-1, *[1] * (inputs.dim() - 2))


def _channel_error(inputs: Tensor) -> str:
    if inputs.dim() < 2 or not inputs.is_floating_point():
        return f"inputs of shape {list(inputs.shape)} and dtype {inputs.dtype} have no floating-point channels"
    return ""


def _sums(inputs: Tensor) -> Tensor:
    """Return n, sum x and sum x^2 of each channel, float64 [3, C] on the CPU."""
    columns = inputs.transpose(0, 1).flatten(1).double()
    count = torch.full_like(columns[:, 0], columns.shape[1])
    return torch.stack((count, columns.sum(1), columns.square().sum(1))).cpu()


class Normalise:
    """Compute (x - mean) / std with given numbers, one per channel or one for all."""

    is_random = False

    def __init__(self, mean: float | list[float], std: float | list[float]):
        self.mean = [mean] if isinstance(mean, int | float) else list(mean)
        self.std = [std] if isinstance(std, int | float) else list(std)
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ValueError(f"mean={mean} std={std}\n  valid: equally many of both, and each std above 0")

    def __call__(self, batch: Batch) -> Examples:
        mean, std = _per_channel(self.mean, batch.inputs), _per_channel(self.std, batch.inputs)
        return (batch.inputs - mean) / std, batch.targets

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if error := _channel_error(inputs):
            return error
        if len(self.mean) not in (1, inputs.shape[1]):
            return f"{len(self.mean)} means for {inputs.shape[1]} channels: set one per channel, or one for all"
        return ""


class Standardise:
    """Compute (x - mean) / std with the statistics of each channel over the training examples.

    The statistics follow from n, sum x and sum x^2 in float64, which are summed over the silos: no example leaves its
    silo. A constant channel is only centered.
    """

    is_random = False

    def __init__(self):
        self.mean = self.std = torch.empty(0)

    def __call__(self, batch: Batch) -> Examples:
        return (batch.inputs - _per_channel(self.mean, batch.inputs)) / _per_channel(
            self.std, batch.inputs
        ), batch.targets

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        return _channel_error(inputs)

    def fit(self, batches: Iterable[Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Compute the statistics of these batches [B, C, ...], at least one, and those of other ranks."""
        count, first, second = total(torch.stack([_sums(inputs) for inputs in batches]).sum(0))
        self.mean = first / count
        variance = (second / count - self.mean.square()).clamp_(min=0)
        self.std = torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))
