"""Language modelling: the next token at each position."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from trainer.tasks.base import IGNORED, shape_mismatch, to_full_precision, type_mismatch, weighted_sum


class LanguageModelling:
    """Cross-entropy over outputs [B, T, vocabulary] and int64 targets [B, T]; perplexity. A unit is a token.

    Targets of -100 are ignored, and do not count.
    """

    scores = ("perplexity",)
    headline = "perplexity"
    unit_name = "token"
    has_confusion = False

    def units(self, targets: Tensor) -> int:
        return targets.shape[1]

    def counted_units(self, targets: Tensor) -> Tensor:
        """Return the number of targets of each example that are not ignored, [B]."""
        return (targets != IGNORED).sum(1)

    def loss_sum(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")
        losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return weighted_sum(losses.view_as(targets), weights)

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(to_full_precision(outputs.flatten(0, 1)), targets.flatten(), reduction="none")
        return losses.view_as(targets).double().sum(1, keepdim=True)

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        loss = sums.item() / units if units else math.nan
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # finite in float64

    def pooled_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {}

    def pooled_summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {}

    def mismatch(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if outputs.dim() != 3 or targets.dim() != 2 or outputs.shape[:2] != targets.shape:
            expected = "language modelling expects outputs [batch, length, vocabulary] and targets [batch, length]"
            return shape_mismatch(outputs, targets, expected)
        if classes and outputs.shape[2] != classes:
            return f"{outputs.shape[2]} outputs, but the vocabulary has {classes}: set model.vocabulary={classes}"
        return type_mismatch(outputs, targets, are_labels=True)
