"""Examples mixed with others of their client."""

from __future__ import annotations

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

from trainer.data.transforms.base import Batch, Examples, uniform
from trainer.utils.hardware import to_device


class MixUp:
    """x <- l x + (1 - l) x', y <- l y + (1 - l) y' with l ~ Beta(alpha, alpha) (Zhang et al. 2018, arXiv 1710.09412).

    x' is any example of the same client, drawn for each x, so that what is mixed does not depend on who trains beside
    whom. Targets become float32 probabilities [B, classes].
    """

    is_random = True

    def __init__(self, alpha: float = 0.2):
        if alpha <= 0:
            raise ValueError(f"alpha={alpha:g}\n  valid: above 0")
        self.alpha = alpha

    def __call__(self, batch: Batch) -> Examples:
        drawn = uniform(batch.key, batch.numbers, 2)
        others = batch.members[(drawn[:, 0] * len(batch.members)).long()]
        inputs, targets = batch.fetch(others)
        part = torch.from_numpy(betaincinv(self.alpha, self.alpha, drawn[:, 1].numpy()))
        part = to_device(part.to(batch.inputs.dtype), batch.inputs.device)
        mixed = _interpolate(batch.inputs, inputs, part)
        return mixed, _interpolate(self._soft(batch.targets, batch), self._soft(targets, batch), part)

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if not inputs.is_floating_point() or targets.dim() != 1 or not classes:
            return "only numbers with one label an example can be mixed"
        return ""

    def _soft(self, targets: Tensor, batch: Batch) -> Tensor:
        assert batch.classes
        return F.one_hot(targets, batch.classes).to(batch.inputs.dtype)


def _interpolate(one: Tensor, other: Tensor, part: Tensor) -> Tensor:
    return torch.lerp(other, one, part.view(-1, *[1] * (one.dim() - 1)))
