"""Optimizers whose parameters are in groups: which of them decay, and at which rate they learn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Named = tuple[str, Tensor]
Rate = tuple[str, float]  # what a name holds, and a factor on its learning rate


@dataclass(frozen=True)
class GroupedOptimizerFactory:
    """Makes an optimizer with parameter groups.

    make                     makes it from groups
    exclude_norm_bias_decay  whether norms and biases, which are tensors of fewer than two dimensions, are left out of
                             weight decay
    lr_multipliers           regular expressions, each with a factor on the learning rate of the parameters in whose
                             names it is found; the first that is found counts, and parameters in whose names none is
                             found come first in the optimizer
    """

    make: Callable[..., torch.optim.Optimizer]
    exclude_norm_bias_decay: bool = False
    lr_multipliers: tuple[Rate, ...] = ()

    def __call__(self, parameters: Iterable[Tensor | Named]) -> torch.optim.Optimizer:
        """The optimizer of these parameters. Raises ValueError when it has no weight decay to leave them out of."""
        groups: dict[tuple[float, bool], list[Named]] = {(1.0, True): []}
        for name, parameter in map(_named, parameters):
            decays = parameter.dim() > 1 or not self.exclude_norm_bias_decay
            groups.setdefault((self._factor(name), decays), []).append((name, parameter))
        found = [
            {"params": members, "factor": factor, "decays": decays}
            for (factor, decays), members in groups.items()
            if members
        ]
        optimizer = self.make(found)
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("factor")
            if not group.pop("decays"):
                self._stop_decay(group)
        return optimizer

    def unused(self, names: Sequence[str]) -> list[str]:
        """The patterns of lr_multipliers that none of these names goes by."""
        return [
            pattern for pattern, _ in self.lr_multipliers if not any(self._pattern(name) == pattern for name in names)
        ]

    def _factor(self, name: str) -> float:
        return dict(self.lr_multipliers).get(self._pattern(name), 1.0)

    def _pattern(self, name: str) -> str:
        """The first pattern that is found in a name; empty for none."""
        return next((pattern for pattern, _ in self.lr_multipliers if re.search(pattern, name)), "")

    def _stop_decay(self, group: dict[str, Any]) -> None:
        if "weight_decay" not in group:
            raise ValueError(
                "it has no weight decay, of which optimizer.exclude_norm_bias_decay=true could relieve anything"
            )
        group["weight_decay"] = 0.0


def _named(parameter: Tensor | Named) -> Named:
    return parameter if isinstance(parameter, tuple) else ("", parameter)
