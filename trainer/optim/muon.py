"""Muon, and AdamW for what is not a matrix, as one optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """Muon for the matrices inside a model, AdamW for all else: Jordan et al. 2024 (kellerjordan.github.io/posts/muon).

    A matrix's momentum is made orthogonal by five steps of Newton and Schulz before it is applied. Its rate is scaled
    as in Liu et al. 2025 (arXiv 2502.16982), so that one `lr` and one `weight_decay`, those of an AdamW, are right for
    both. All else is what has not two dimensions, and matrices in whose names the regular expression `adamw` is found:
    embeddings and outputs. Names come with the parameters, as torch's optimizers take them.
    """

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
        if inside := list(_parts(self.param_groups, adamw, True)):
            self.parts.append(torch.optim.Muon(inside, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if others := list(_parts(self.param_groups, adamw, False)):
            self.parts.append(torch.optim.AdamW(others, betas=(betas[0], betas[1])))
        # The groups are those of the parts: a rate that is set here is theirs.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both, from the state that is here."""
        for part in self.parts:
            part.state = self.state
            part.step()


def _parts(groups: Iterable[dict[str, Any]], adamw: str, inside: bool) -> Iterator[dict[str, Any]]:
    """The groups with those of their parameters that are matrices inside the model, or with the others."""
    for group in groups:
        rest = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        names = group.get("param_names", [""] * len(group["params"]))
        named = zip(names, group["params"], strict=True)
        chosen = [p for name, p in named if (p.dim() == 2 and not re.search(adamw, name)) == inside]
        if chosen:
            yield {"params": chosen, **rest}
