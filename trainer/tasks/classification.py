"""Classification: one label per example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.tasks.base import shape_mismatch, to_full_precision, type_mismatch, weighted_sum
from trainer.tasks.metrics import (
    auc,
    calibration_error,
    calibration_sums,
    macro_f1,
    mean,
    score_counts,
    sensitivity,
    specificity,
)

TOP = 5

ClassWeights = Literal["balanced"] | list[float] | None


class Classification:
    """Cross-entropy over outputs [B, classes] and int64 targets [B]; accuracy.

    Pooled scores are the means over classes of F1, sensitivity and specificity, the expected calibration error, and the
    top-5 accuracy for more than 5 classes. For 2 classes sensitivity and specificity are those of class 1, and there is
    the area under the ROC curve.

    class_weights: weights of the examples in training by class, a number per class. With `balanced`, all classes have
        the same total weight: N / (K n_c), where K classes occur and n_c of N examples are of class c.
    """

    scores = ("accuracy", "macro_f1", "top5", "auc", "sensitivity", "specificity", "calibration_error")
    headline = "accuracy"
    unit_name = "example"
    has_confusion = True

    def __init__(self, class_weights: ClassWeights = None):
        if isinstance(class_weights, list) and not _are_weights(class_weights):
            raise ValueError(
                f"task.class_weights={class_weights}\n"
                "  valid: finite numbers from 0, one per class and not all 0; balanced; or null"
            )
        self.class_weights: ClassWeights = class_weights

    def units(self, targets: Tensor) -> int:
        return 1

    def loss_sum(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return F.cross_entropy(outputs, targets, reduction="sum")
        return weighted_sum(F.cross_entropy(outputs, targets, reduction="none"), weights)

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(to_full_precision(outputs), targets, reduction="none")
        return torch.stack((losses, outputs.argmax(1).eq(targets)), 1).double()

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        loss, correct = (sums / units).tolist() if units else (math.nan, math.nan)
        return {"loss": loss, "accuracy": correct}

    def pooled_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `by_class` [classes, 3]: true positives, predicted positives, and positives.

        Also `by_confidence`, see `calibration_sums`, the number of `top5` hits, and the counts `by_score` of two
        classes, see `score_counts`.
        """
        outputs = to_full_precision(outputs)
        confidences = outputs.softmax(1).amax(1).cpu()
        outputs, targets = outputs.cpu(), targets.cpu()
        classes, predicted = outputs.shape[1], outputs.argmax(1)
        counted = (targets[predicted == targets], predicted, targets)
        sums = {"by_class": torch.stack([torch.bincount(labels, minlength=classes) for labels in counted], 1)}
        sums["by_confidence"] = calibration_sums(confidences, predicted == targets)
        if classes > TOP:
            sums["top5"] = outputs.topk(TOP, 1).indices.eq(targets[:, None]).sum()
        if classes == 2:
            sums["by_score"] = score_counts(outputs[:, 1:] - outputs[:, :1], targets[:, None])
        return sums

    def pooled_summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        by_class = sums["by_class"]
        examples, rows = by_class[:, 2].sum(), by_class[1:] if len(by_class) == 2 else by_class
        scores = {
            "macro_f1": macro_f1(by_class),
            "sensitivity": sensitivity(rows),
            "specificity": specificity(rows, examples),
            "calibration_error": calibration_error(sums["by_confidence"]),
        }
        if "top5" in sums:
            scores["top5"] = mean(sums["top5"], examples)
        if "by_score" in sums:
            scores["auc"] = auc(sums["by_score"])
        return scores

    def predictions(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return the probability of each class as `scores` [B, classes], and the most probable one as `label` [B]."""
        return {"scores": outputs.softmax(1), "label": outputs.argmax(1)}

    def mismatch(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if outputs.dim() != 2 or targets.dim() != 1:
            return shape_mismatch(
                outputs, targets, "classification expects outputs [batch, classes] and targets [batch]"
            )
        if classes and outputs.shape[1] != classes:
            return (
                f"{outputs.shape[1]} outputs, but the data has {classes} classes: set model.classes={classes}, or "
                f"+model.config.num_labels={classes}"
            )
        if targets.is_floating_point() or targets.dtype == torch.bool:
            return (
                f"the targets are {targets.dtype}, and labels are integers: set data.classes={outputs.shape[1]}, by "
                "which whole numbers of a file are labels, or convert them by .long()"
            )
        return type_mismatch(outputs, targets, are_labels=True)


def _are_weights(numbers: list[float]) -> bool:
    return all(0 <= number < math.inf for number in numbers) and any(numbers)
