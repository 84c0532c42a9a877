"""What a task is: the verbs, and what its judges have in common.

A unit is what the loss is a mean over: an example for classification, a token for language modelling, a label or a
number for tasks that have several an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Task(Protocol):
    """Abstract: the verbs of a task.

    Scores of few sums, such as a mean over units, are told of every client, from `score_sums`. Those of many, such as
    an F1 by class, are told of all examples together, from `pooled_sums`: counts, added up before they are divided.
    """

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of the figures that there may be besides the loss."""
        ...

    @property
    def headline(self) -> str:
        """The figure that tells most, one of the summary's. Which way is better goes by `higher_is_better`."""
        ...

    def units(self, targets: Tensor) -> int:
        """The number of units that one example of these targets [B, ...] holds."""
        ...

    def loss_sum(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss summed over units, each example's times its weight [B] if there are any: a scalar with a gradient.

        It is called without the last argument where examples have no weights.
        """
        ...

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Each example's sums over its units, float64 [B, k]: the loss, then whatever the summary is made from."""
        ...

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        """Named figures from sums [k] over that many units; NaN when there are none."""
        ...

    def pooled_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Named sums over these examples, of any shapes that do not depend on their number; empty for none."""
        ...

    def pooled_summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Named figures from the `pooled_sums` of all examples, float64; NaN when there are none."""
        ...

    def mismatch(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        """Why this output cannot be judged against these targets; empty when it can."""
        ...


REQUIRED_METHODS = tuple(name for name in vars(Task) if not name.startswith("_"))


def to_full_precision(outputs: Tensor) -> Tensor:
    """The outputs in float32, or better where they are."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """The sum of losses [B, ...], each example's times its weight [B]."""
    return (losses * weights.view(-1, *[1] * (losses.dim() - 1))).sum()


def shape_mismatch(outputs: Tensor, targets: Tensor, wanted: str) -> str:
    """What is said of shapes that are not the wanted ones."""
    return f"outputs of shape {list(outputs.shape)} for targets of shape {list(targets.shape)}; {wanted}"
