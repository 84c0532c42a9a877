"""Transforms that mix examples of a client."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.transforms.base import Batch, Examples, uniform
from trainer.utils.hardware import to_device


class MixUp:
    """Mix x <- l x + (1 - l) x', y <- l y + (1 - l) y' with l ~ Beta(alpha, alpha).

    x' is drawn for each x from the examples of the same client, not from the batch, so that the result does not depend
    on the number of replicas. Targets become float32 probabilities [B, classes]. Zhang et al. 2018, arXiv 1710.09412.
    """

    is_random = True

    def __init__(self, alpha: float = 0.2):
        if alpha <= 0:
            raise ValueError(f"alpha={alpha:g}\n  valid: above 0")
        self.alpha = alpha

    def __call__(self, batch: Batch) -> Examples:
        from scipy.special import betaincinv  # takes longer to import than the rest of the package

        drawn = uniform(batch.key, batch.numbers, 2)
        others = batch.members[(drawn[:, 0] * len(batch.members)).long()]
        inputs, targets = batch.fetch(others)
        ratio = torch.from_numpy(betaincinv(self.alpha, self.alpha, drawn[:, 1].numpy()))
        ratio = to_device(ratio.to(batch.inputs.dtype), batch.inputs.device)
        mixed = _interpolate(batch.inputs, inputs, ratio)
        return mixed, _interpolate(self._one_hot(batch.targets, batch), self._one_hot(targets, batch), ratio)

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if not inputs.is_floating_point() or targets.dim() != 1 or not classes:
            return "mixing needs floating-point inputs and one label per example"
        return ""

    def _one_hot(self, targets: Tensor, batch: Batch) -> Tensor:
        assert batch.classes
        return F.one_hot(targets, batch.classes).to(batch.inputs.dtype)


def _interpolate(values: Tensor, others: Tensor, ratio: Tensor) -> Tensor:
    return torch.lerp(others, values, ratio.view(-1, *[1] * (values.dim() - 1)))
