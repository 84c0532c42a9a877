"""What a model is asked to do: a loss and scores that are sums, so that any split of the examples adds up.

A unit is what the loss is a mean over: an example for classification, a token for language modelling.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Task(Protocol):
    """Abstract: the verbs of a task."""

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of what is measured besides the loss."""
        ...

    @property
    def headline(self) -> str:
        """The figure that tells most, one of the summary's."""
        ...

    def units(self, targets: Tensor) -> int:
        """The number of units that one example of these targets [B, ...] holds."""
        ...

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss summed over units: a scalar with a gradient."""
        ...

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Each example's sums over its units, float64 [B, 1 + len(scores)]: the loss, then the scores."""
        ...

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        """Named figures from sums [1 + len(scores)] over that many units; NaN when there are none."""
        ...

    def fault(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        """Why this output cannot be judged against these targets; empty when it can."""
        ...


class Classification:
    """One label an example: cross-entropy over outputs [B, classes] and int64 targets [B]; accuracy."""

    scores = ("accuracy",)
    headline = "accuracy"

    def units(self, targets: Tensor) -> int:
        return 1

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(_precise(outputs), targets, reduction="none")
        return torch.stack((losses, outputs.argmax(1).eq(targets)), 1).double()

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        loss, correct = (sums / units).tolist() if units else (math.nan, math.nan)
        return {"loss": loss, "accuracy": correct}

    def fault(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if outputs.dim() != 2 or targets.dim() != 1:
            return (
                f"outputs of shape {_shape(outputs)} for targets of shape {_shape(targets)}; "
                "classification wants outputs [batch, classes] and targets [batch]"
            )
        if classes and outputs.shape[1] != classes:
            return f"{outputs.shape[1]} outputs, but the data has {classes} classes: set model.classes={classes}"
        return ""


class LanguageModelling:
    """The next token at each position: cross-entropy over outputs [B, T, vocabulary] and int64 targets [B, T]."""

    scores = ()
    headline = "perplexity"

    def units(self, targets: Tensor) -> int:
        return targets.shape[1]

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(_precise(outputs.flatten(0, 1)), targets.flatten(), reduction="none")
        return losses.view_as(targets).double().sum(1, keepdim=True)

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        loss = sums.item() / units if units else math.nan
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def fault(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if outputs.dim() != 3 or targets.dim() != 2 or outputs.shape[:2] != targets.shape:
            return (
                f"outputs of shape {_shape(outputs)} for targets of shape {_shape(targets)}; "
                "language modelling wants outputs [batch, length, vocabulary] and targets [batch, length]"
            )
        if classes and outputs.shape[2] != classes:
            return f"{outputs.shape[2]} outputs, but the vocabulary has {classes}: set model.vocabulary={classes}"
        return ""


def _precise(outputs: Tensor) -> Tensor:
    """The outputs in float32, or better where they are."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
