"""Transforms that normalize channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from trainer.data.transforms.base import Batch, Examples

ROUNDING_UNITS = 8  # of the precision of inputs, relative to the mean: a channel of a smaller spread is constant


def _per_channel(values: Sequence[float] | Tensor, inputs: Tensor) -> Tensor:
    """Reshape values [C] to broadcast along the channels, the second dimension, of inputs [B, C, ...]."""
    return torch.as_tensor(values, dtype=inputs.dtype, device=inputs.device).view(-1, *[1] * (inputs.dim() - 2))


def _channel_error(inputs: Tensor) -> str:
    if inputs.dim() < 2 or not inputs.is_floating_point():
        return f"inputs of shape {list(inputs.shape)} and dtype {inputs.dtype} have no floating-point channels"
    return ""


def _moments(inputs: Tensor) -> Tensor:
    """Return n, the mean and the sum of squared deviations from it of each channel, float64 [3, C] on the CPU."""
    columns = inputs.transpose(0, 1).flatten(1).double()
    mean = columns.mean(1) if columns.shape[1] else columns.new_zeros(len(columns))
    return torch.stack((torch.full_like(mean, columns.shape[1]), mean, (columns - mean[:, None]).square().sum(1))).cpu()


def _merge(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the moments of two sets of examples together (Chan, Golub and LeVeque 1979)."""
    (count, mean, squares), (others, other_mean, other_squares) = ours, theirs
    total, difference = count + others, other_mean - mean
    squares = squares + other_squares + difference.square() * count * others / total
    return torch.stack((total, mean + difference * others / total, squares))


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

    Deviations are squared, not the numbers themselves, whose squares hide a small deviation from a large mean. Of each
    rank's examples n, n times the mean and the squared deviations are summed in float64: no example leaves its silo. A
    channel that is constant up to rounding is only centered.
    """

    is_random = False

    def __init__(self):
        self.mean = self.std = torch.empty(0)

    def __call__(self, batch: Batch) -> Examples:
        return (batch.inputs - _per_channel(self.mean, batch.inputs)) / _per_channel(
            self.std, batch.inputs
        ), batch.targets

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if error := _channel_error(inputs):
            return error
        if len(self.mean) not in (0, inputs.shape[1]):
            return f"its statistics are of {len(self.mean)} channels, and the inputs have {inputs.shape[1]}"
        return ""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mean and the standard deviation, float64 [C]."""
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the statistics of a `state_dict`."""
        self.mean, self.std = state["mean"], state["std"]

    def fit(self, batches: Iterable[Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Compute the statistics of these batches [B, C, ...], at least one, perhaps empty, and those of other ranks.

        Raises:
            ValueError: a number of a channel, on any rank, is not finite.
        """
        batches = iter(batches)
        first = next(batches)
        count, mean, squares = reduce(_merge, map(_moments, batches), _moments(first))
        count_of_all, sum_of_all = total(torch.stack((count, count * mean)))
        self.mean = sum_of_all / count_of_all
        squares_of_all = total(squares + count * (mean - self.mean).square())
        self.std = (squares_of_all / count_of_all).sqrt()
        if not (is_finite := self.std.isfinite()).all():
            channel = int(is_finite.int().argmin())
            raise ValueError(
                f"transforms=standardise: numbers of channel {channel} are not finite.\n"
                "  leave the examples out that have them, or set transforms=normalise"
            )
        # A spread of a few units in the last place of the mean is rounding, and dividing by it would make noise large.
        precision = torch.finfo(first.dtype)
        self.std[self.std <= (ROUNDING_UNITS * precision.eps * self.mean.abs()).clamp_(min=precision.tiny)] = 1.0
