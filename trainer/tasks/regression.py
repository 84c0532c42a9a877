"""Regression: any number of continuous targets per example."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.tasks.base import shape_mismatch, to_full_precision, type_mismatch, weighted_sum
from trainer.tasks.metrics import r2


class Regression:
    """Squared error of outputs and targets, both [B] or [B, ...]; mean absolute error. A unit is one number.

    Outputs [B, 1] fit targets [B]. The pooled score is R2, the mean over the numbers of an example.

    huber: delta of the Huber loss (Huber 1964), 0.5 e^2 for errors up to delta and delta (|e| - 0.5 delta) above. None
        is e^2.
    """

    scores = ("mae", "r2")
    headline = "mae"
    unit_name = "number"
    has_confusion = False

    def __init__(self, huber: float | None = None):
        if huber is not None and not huber > 0:
            raise ValueError(f"task.huber={huber}\n  valid: a number above 0, or null for the squared error")
        self.huber = huber

    def units(self, targets: Tensor) -> int:
        return math.prod(targets.shape[1:])

    def loss_sum(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        outputs, targets = outputs.reshape(targets.shape), targets.to(outputs.dtype)
        if weights is None:
            return self._losses(outputs, targets, "sum")
        return weighted_sum(self._losses(outputs, targets, "none"), weights)

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets = _flatten(outputs, targets)
        losses = self._losses(outputs, targets, "none")
        return torch.stack((losses.double().sum(1), (outputs - targets).abs().double().sum(1)), 1)

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        loss, error = (sums / units).tolist() if units else (math.nan, math.nan)
        return {"loss": loss, "mae": error}

    def pooled_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `by_number` [numbers, 4]: sums of 1, targets, squared targets, and squared errors."""
        outputs, targets = (tensor.double() for tensor in _flatten(outputs, targets))
        columns = (torch.ones_like(targets), targets, targets.square(), (outputs - targets).square())
        return {"by_number": torch.stack([column.sum(0) for column in columns], 1)}

    def pooled_summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"r2": r2(sums["by_number"])}

    def mismatch(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if outputs.shape not in (targets.shape, (*targets.shape, 1)):
            return shape_mismatch(outputs, targets, "regression expects as many outputs as targets per example")
        return type_mismatch(outputs, targets)

    def _losses(self, outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
        if self.huber is None:
            return F.mse_loss(outputs, targets, reduction=reduction)
        return F.huber_loss(outputs, targets, reduction=reduction, delta=self.huber)


def _flatten(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Reshape both to [B, numbers], in float32 or better."""
    exact = to_full_precision(outputs)
    shape = (len(targets), math.prod(targets.shape[1:]))
    return exact.reshape(shape), targets.to(exact.dtype).reshape(shape)
