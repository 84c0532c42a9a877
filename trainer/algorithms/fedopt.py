"""The adaptive server optimizers of FedOpt; torch's own differ, with bias correction and a second moment from 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Rule = Literal["adagrad", "adam", "yogi"]


class FedOpt(torch.optim.Optimizer):
    """w <- w - lr m / (sqrt(v) + tau), with m <- beta1 m + (1 - beta1) d, for the mean update d as the gradient.

    Reddi et al. 2021 (arXiv 2003.00295), algorithm 2: no bias correction, tau outside the root, v from tau^2 on, and

        adagrad  v <- v + d^2
        adam     v <- beta2 v + (1 - beta2) d^2
        yogi     v <- v - (1 - beta2) d^2 sign(v - d^2)
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        rule: Rule = "adam",
        betas: tuple[float, float] = (0.9, 0.99),
        tau: float = 1e-3,
    ):
        if rule not in get_args(Rule):
            raise ValueError(f"server.rule={rule}\n  valid: {', '.join(get_args(Rule))}")
        if lr < 0 or tau <= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"server.lr={lr}, server.tau={tau}, server.betas={list(betas)}\n"
                "  valid: lr from 0, tau above 0, betas from 0 to below 1"
            )
        super().__init__(params, {"lr": lr, "rule": rule, "betas": tuple(betas), "tau": tau})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.full_like(parameter, group["tau"] ** 2)
        mean, square, (beta1, beta2) = state["mean"], state["square"], group["betas"]
        mean.lerp_(gradient, 1 - beta1)
        if group["rule"] == "adagrad":
            square.addcmul_(gradient, gradient)
        elif group["rule"] == "adam":
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        else:
            squared = gradient.square()
            square.sub_((square - squared).sign_().mul_(squared), alpha=1 - beta2)
        parameter.addcdiv_(mean, square.sqrt().add_(group["tau"]), value=-group["lr"])
