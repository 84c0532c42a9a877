"""Multi-label classification: any number of labels per example."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.tasks.base import shape_mismatch, to_full_precision, type_mismatch, weighted_sum
from trainer.tasks.metrics import (
    auc,
    calibration_error,
    calibration_sums,
    f1,
    macro_f1,
    score_counts,
    sensitivity,
    specificity,
)


class MultiLabel:
    """Binary cross-entropy over logits [B, labels] and targets [B, labels] of 0 and 1; F1 of all labels (micro).

    A unit is one label of one example. A label is predicted if its logit is above 0. Pooled scores are the means over
    labels of F1, sensitivity, specificity, and of the area under the ROC curve, and the expected calibration error of
    all single decisions, whose confidence is the probability of what is predicted.

    auc: whether to compute the area under the ROC curve, for which ranks exchange some hundred kilobytes per label.
    """

    scores = ("micro_f1", "macro_f1", "auc", "sensitivity", "specificity", "calibration_error")
    headline = "micro_f1"
    unit_name = "label"
    has_confusion = False

    def __init__(self, auc: bool = True):
        self.has_auc = auc

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
        counts = [positives.double() for positives in _positives(outputs, targets)]
        return torch.stack([losses.double(), *counts], 2).sum(1)

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        if not units:
            return {"loss": math.nan, "micro_f1": math.nan}
        # Without positives and predicted positives F1 is 0, as in scikit-learn.
        return {"loss": sums[0].item() / units, "micro_f1": f1(sums[1:]).nan_to_num(0.0).item()}

    def pooled_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `by_label` [labels, 3], counts for `f1`, the number of `examples`, and two more.

        They are `by_confidence`, see `calibration_sums`, and the counts `by_score`, see `score_counts`.
        """
        outputs, targets = to_full_precision(outputs).cpu(), targets.cpu()
        correct = (outputs > 0) == (targets > 0)
        sums = {
            "by_label": torch.stack([positives.sum(0) for positives in _positives(outputs, targets)], 1),
            "examples": torch.tensor(len(targets)),
            "by_confidence": calibration_sums(outputs.abs().sigmoid().flatten(), correct.flatten()),
        }
        if self.has_auc:
            sums["by_score"] = score_counts(outputs, targets)
        return sums

    def pooled_summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        by_label = sums["by_label"]
        scores = {
            "macro_f1": macro_f1(by_label),
            "sensitivity": sensitivity(by_label),
            "specificity": specificity(by_label, sums["examples"]),
            "calibration_error": calibration_error(sums["by_confidence"]),
        }
        return scores | ({"auc": auc(sums["by_score"])} if "by_score" in sums else {})

    def predictions(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return the probability of each label as `scores`, and as `label` 1 for those predicted, [B, labels] both."""
        return {"scores": outputs.sigmoid(), "label": (outputs > 0).long()}

    def mismatch(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if outputs.dim() != 2 or targets.dim() != 2:
            return shape_mismatch(outputs, targets, "multi-label expects both to be [batch, labels]")
        if outputs.shape != targets.shape:
            labels = targets.shape[1]
            return f"{outputs.shape[1]} outputs, but the data has {labels} labels: set model.classes={labels}"
        if not bool(((targets == 0) | (targets == 1)).all()):
            return "targets must be 0 or 1"
        return type_mismatch(outputs, targets)


def _positives(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the true positives, the predicted positives, and the positives, bool [B, labels] each."""
    predicted, positive = outputs > 0, targets > 0
    return predicted & positive, predicted, positive
