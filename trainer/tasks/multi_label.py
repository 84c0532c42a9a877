"""Several labels an example, each there or not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.tasks.base import shape_mismatch, to_full_precision, weighted_sum
from trainer.tasks.counts import BINS, auc, f1, macro_f1, score_histogram


class MultiLabel:
    """Labels that are there or not: binary cross-entropy over logits [B, labels] and targets [B, labels] of 0 and 1.

    A unit is one label of one example. A label is predicted where its logit is above 0. The headline is the F1 of all
    labels together (micro); of all examples together also the means over the labels of F1 and of the area under the
    receiver operating characteristic, whose histograms have `auc_bins` bins a label, or 0 for none.
    """

    scores = ("micro_f1", "macro_f1", "auc")
    headline = "micro_f1"

    def __init__(self, auc_bins: int = BINS):
        if auc_bins < 0:
            raise ValueError(f"task.auc_bins={auc_bins}\n  valid: a whole number from 0")
        self.auc_bins = auc_bins

    def units(self, targets: Tensor) -> int:
        return targets.shape[1]

    def loss_sum(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="sum")
        losses = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
        return weighted_sum(losses, weights)

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        exact = to_full_precision(outputs)
        losses = F.binary_cross_entropy_with_logits(exact, targets.to(exact.dtype), reduction="none")
        return torch.stack([losses.double(), *(found.double() for found in _true_positives(outputs, targets))], 2).sum(
            1
        )

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        if not units:
            return {"loss": math.nan, "micro_f1": math.nan}
        # Where nothing is there and nothing was found, 0, as scikit-learn has it.
        return {"loss": sums[0].item() / units, "micro_f1": f1(sums[1:]).nan_to_num(0.0).item()}

    def pooled_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """By label [labels, 3], as `f1` wants them; and histograms [labels, 2, bins]."""
        outputs, targets = to_full_precision(outputs).cpu(), targets.cpu()
        sums = {"by_label": torch.stack([found.sum(0) for found in _true_positives(outputs, targets)], 1)}
        if self.auc_bins:
            sums["by_score"] = score_histogram(outputs, targets, self.auc_bins)
        return sums

    def pooled_summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        figures = {"macro_f1": macro_f1(sums["by_label"])}
        return figures | ({"auc": auc(sums["by_score"])} if "by_score" in sums else {})

    def mismatch(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if outputs.dim() != 2 or targets.dim() != 2:
            return shape_mismatch(outputs, targets, "multi-label wants both to be [batch, labels]")
        if outputs.shape != targets.shape:
            labels = targets.shape[1]
            return f"{outputs.shape[1]} outputs, but the data has {labels} labels: set model.classes={labels}"
        if not bool(((targets == 0) | (targets == 1)).all()):
            return "targets must be 0, where a label is not there, or 1"
        return ""


def _true_positives(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a label is rightly predicted, predicted, and there: bool [B, labels] each."""
    predicted, there = outputs > 0, targets > 0
    return predicted & there, predicted, there
