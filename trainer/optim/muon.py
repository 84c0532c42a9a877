"""Muon for matrices and AdamW for the other parameters, as one optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices, AdamW for the other parameters: Jordan et al. 2024 (kellerjordan.github.io/posts/muon).

    The momentum of a matrix is orthogonalized by five Newton-Schulz steps before it is applied. The learning rate is
    adjusted as in Liu et al. 2025 (arXiv 2502.16982), so the same `lr` and `weight_decay` suit both optimizers.

    params: parameters or groups, with names as torch's optimizers accept them.
    adamw: regular expression for the names of matrices that AdamW optimizes, such as embeddings and outputs. Tensors
        that do not have two dimensions always go to AdamW.

    needs_matrices: its step depends on the shapes of the parameters. No element-wise optimizer has this attribute.
    """

    needs_matrices = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.001,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw: str = "embed|tokens|positions|output|head",
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.parts: list[torch.optim.Optimizer] = []
        if hidden := list(_select(self.param_groups, adamw, True)):
            self.parts.append(torch.optim.Muon(hidden, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if others := list(_select(self.param_groups, adamw, False)):
            self.parts.append(torch.optim.AdamW(others, betas=(betas[0], betas[1])))
        # The group objects are shared with the parts: a learning rate set here applies to them.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step both optimizers."""
        for part in self.parts:
            part.state = self.state  # may have been replaced since the last step, by an OptimizerState
            part.step()


def _select(groups: Iterable[dict[str, Any]], adamw: str, hidden: bool) -> Iterator[dict[str, Any]]:
    """Yield the groups restricted to their hidden matrices, or to their other parameters."""
    for group in groups:
        options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        names = group.get("param_names", [""] * len(group["params"]))
        named = zip(names, group["params"], strict=True)
        selected = [p for name, p in named if (p.dim() == 2 and not re.search(adamw, name)) == hidden]
        if selected:
            yield {"params": selected, **options}
