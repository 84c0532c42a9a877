"""One label an example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.tasks.base import shape_mismatch, to_full_precision, weighted_sum
from trainer.tasks.counts import auc, macro_f1, mean, score_histogram

TOP = 5

ClassWeights = Literal["balanced"] | list[float] | None


class Classification:
    """One label an example: cross-entropy over outputs [B, classes] and int64 targets [B]; accuracy.

    `class_weights` are what the examples of each class count in training, a number a class; or `balanced`, as much for
    all classes together as for each other one: N / (K n_c), if K classes occur and n_c of N examples are of class c.

    Of all examples together also the mean F1 of the classes, and of more than 5 classes how often the right one is
    among the 5 likeliest, of 2 classes the area under the receiver operating characteristic (`counts.auc`).
    """

    scores = ("accuracy", "macro_f1", "top5", "auc")
    headline = "accuracy"

    def __init__(self, class_weights: ClassWeights = None):
        if isinstance(class_weights, list) and not _are_weights(class_weights):
            raise ValueError(
                f"task.class_weights={class_weights}\n"
                "  valid: finite numbers from 0, one a class and not all of them 0; balanced; or null"
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
        """By class [classes, 3]: examples rightly taken for it, taken for it, and of it."""
        outputs, targets = to_full_precision(outputs).cpu(), targets.cpu()
        classes, predicted = outputs.shape[1], outputs.argmax(1)
        found = (targets[predicted == targets], predicted, targets)
        sums = {"by_class": torch.stack([torch.bincount(labels, minlength=classes) for labels in found], 1)}
        if classes > TOP:
            sums["top5"] = outputs.topk(TOP, 1).indices.eq(targets[:, None]).sum()
        if classes == 2:
            sums["by_score"] = score_histogram(outputs[:, 1:] - outputs[:, :1], targets[:, None])
        return sums

    def pooled_summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        figures = {"macro_f1": macro_f1(sums["by_class"])}
        if "top5" in sums:
            figures["top5"] = mean(sums["top5"], sums["by_class"][:, 2].sum())
        if "by_score" in sums:
            figures["auc"] = auc(sums["by_score"])
        return figures

    def mismatch(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if outputs.dim() != 2 or targets.dim() != 1:
            return shape_mismatch(outputs, targets, "classification wants outputs [batch, classes] and targets [batch]")
        if classes and outputs.shape[1] != classes:
            return f"{outputs.shape[1]} outputs, but the data has {classes} classes: set model.classes={classes}"
        return ""


def _are_weights(numbers: list[float]) -> bool:
    return all(0 <= number < math.inf for number in numbers) and any(numbers)
