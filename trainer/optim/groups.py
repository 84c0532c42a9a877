"""Parameter groups: learning-rate multipliers and exclusion from weight decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Named = tuple[str, Tensor]
Rate = tuple[str, float]  # a regular expression for names, and a factor on their learning rate


@dataclass(frozen=True)
class GroupedOptimizerFactory:
    """Factory of an optimizer with parameter groups.

    make: makes the optimizer from groups.
    exclude_norm_bias_decay: whether to exclude norms and biases, all tensors of fewer than two dimensions, from weight
        decay.
    lr_multipliers: regular expressions, each with a factor on the learning rate of the parameters whose names it
        matches. The first match counts. Parameters that match none come first in the optimizer.
    """

    make: Callable[..., torch.optim.Optimizer]
    exclude_norm_bias_decay: bool = False
    lr_multipliers: tuple[Rate, ...] = ()

    def __call__(self, parameters: Iterable[Tensor | Named]) -> torch.optim.Optimizer:
        """Make the optimizer of these parameters.

        Raises:
            ValueError: exclude_norm_bias_decay with an optimizer without weight decay, or one without learning rates.
        """
        groups: dict[tuple[float, bool], list[Named]] = {(1.0, True): []}
        for name, parameter in map(_named, parameters):
            decays = parameter.dim() > 1 or not self.exclude_norm_bias_decay
            groups.setdefault((self._factor(name), decays), []).append((name, parameter))
        optimizer = self.make(
            [
                {"params": members, "factor": factor, "decays": decays}
                for (factor, decays), members in groups.items()
                if members
            ]
        )
        for group in optimizer.param_groups:
            if "lr" not in group:
                raise ValueError("it has no lr in its groups, which the schedule and train/learning_rate go by")
            group["lr"] *= group.pop("factor")
            if not group.pop("decays"):
                if "weight_decay" not in group:
                    raise ValueError(
                        "it has no weight decay, from which optimizer.exclude_norm_bias_decay=true could exclude any"
                    )
                group["weight_decay"] = 0.0
        return optimizer

    def unused(self, names: Sequence[str]) -> list[str]:
        """Return the patterns of lr_multipliers that apply to none of these names."""
        return [
            pattern for pattern, _ in self.lr_multipliers if not any(self._pattern(name) == pattern for name in names)
        ]

    def _factor(self, name: str) -> float:
        return dict(self.lr_multipliers).get(self._pattern(name), 1.0)

    def _pattern(self, name: str) -> str:
        """Return the first pattern that matches a name; empty for none."""
        return next((pattern for pattern, _ in self.lr_multipliers if re.search(pattern, name)), "")


def _named(parameter: Tensor | Named) -> Named:
    return parameter if isinstance(parameter, tuple) else ("", parameter)
