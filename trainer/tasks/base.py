"""The interface of a task.

The loss is a mean over units: examples for classification, tokens for language modelling, labels or numbers for tasks
with several per example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from trainer.utils.tensor_trees import num_examples


class Task(Protocol):
    """A loss and scores. Both are made from sums over examples, so that they add up over any split of the examples.

    Scores made from few sums, such as a mean over units, are reported for every client, from `score_sums`. Scores made
    from many, such as an F1 by class, are reported only for all examples together, from `pooled_sums`.

    A task for which some classes weigh more in training than others has the attribute `class_weights`: a number per
    class, `balanced`, or None. It may be missing, which means None. The weight of an example comes to `loss_sum`.

    Targets and outputs are a tensor each. A task that takes a tuple, list or dict of either has `takes_trees = True`.
    The first dimension of all of its targets is that of the examples.

    A task whose loss ignores some targets, such as padding, has a method `counted_units(targets)`: the number of units
    of each example that count, [B]. Losses and scores are then means over those.

    A task that learns from more than the examples, such as a teacher, has the attribute `fingerprint`, a hash of it. A
    run is not resumed with another one.

    A task whose outputs mean something to users of a served model has a method `predictions(outputs)`: tensors [B, ...]
    by name, such as `scores` and `label`. It is exported in the graph of the model, beside the outputs themselves.
    """

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of all possible scores besides the loss."""
        ...

    @property
    def headline(self) -> str:
        """The most telling metric of `summary`. Its name decides whether higher is better, see `higher_is_better`."""
        ...

    @property
    def unit_name(self) -> str:
        """The name of a unit in the singular. With any task whose unit is `token` runs report `tokens_per_second`."""
        ...

    @property
    def has_confusion(self) -> bool:
        """Whether outputs [B, classes] and labels [B] make a confusion matrix, which is drawn at the end of a run."""
        ...

    def units(self, targets: Tensor) -> int:
        """Return the number of units in one example of these targets [B, ...]."""
        ...

    def loss_sum(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss summed over units, a scalar with a gradient.

        Args:
            outputs: of the model, [B, ...].
            targets: of the examples, [B, ...].
            weights: of the examples, [B]. The argument is omitted, not None, if examples have no weights, so a task
                that does not support weights needs no such parameter.
        """
        ...

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each example's sums over its units, float64 [B, k]: the loss first, then what `summary` needs."""
        ...

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        """Return metrics by name from sums [k] over that many units; NaN without units."""
        ...

    def pooled_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return sums over the examples by name, of shapes that do not depend on B; empty without pooled scores.

        A sum may be a sparse tensor like that of `trainer.tasks.metrics.score_counts`, whose scores may be merged.
        """
        ...

    def pooled_summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return metrics by name from the `pooled_sums` of all examples, float64; NaN without examples."""
        ...

    def mismatch(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        """Return why these outputs do not fit these targets; empty if they do."""
        ...


def example_units(task: Task, targets: Tensor) -> Tensor:
    """Return the number of units of each example that count, float64 [B] on the CPU."""
    count = getattr(task, "counted_units", None)
    if count is None:
        return torch.full((num_examples(targets),), task.units(targets), dtype=torch.float64)
    return count(targets).double().cpu()


def fingerprint(task: Task) -> str:
    """Return a hash of what a task learns from besides the examples; empty for most."""
    return getattr(task, "fingerprint", "")


REQUIRED_METHODS = tuple(name for name in vars(Task) if not name.startswith("_"))


def to_full_precision(outputs: Tensor) -> Tensor:
    """Convert outputs to float32, unless they are more precise."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum losses [B, ...], multiplied by the weight [B] of their example."""
    return (losses * weights.view(-1, *[1] * (losses.dim() - 1))).sum()


IGNORED = -100  # the target that torch's losses leave out by default
LABEL_TYPES = (torch.int64, torch.uint8)  # those that torch's cross-entropy takes


def type_mismatch(outputs: Tensor, targets: Tensor, are_labels: bool = False) -> str:
    """Return why outputs, or targets that are labels, cannot be of this type; empty if they can."""
    if not outputs.is_floating_point():
        return f"outputs are {_short(outputs.dtype)}; a loss takes floating-point numbers"
    if are_labels and targets.dtype not in LABEL_TYPES:
        return f"targets are {_short(targets.dtype)}; labels are int64: convert them in data=, such as by .long()"
    return ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_mismatch(outputs: Tensor, targets: Tensor, expected: str) -> str:
    """Describe shapes that are not the expected ones."""
    return f"outputs of shape {list(outputs.shape)} for targets of shape {list(targets.shape)}; {expected}"
