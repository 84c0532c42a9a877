"""How far an optimizer carries its parameters, measured: what SCAFFOLD and FedNova divide by."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from trainer.algorithms.base import ClientOptimizerState
from trainer.optim import GradientClipper, GroupedOptimizerFactory, step
from trainer.optim.optimizers import OptimizerFactory

# Factors on the rates of the steps by which an optimizer is judged: RAdam's first five are those of plain momentum.
PROBE_FACTORS = (1.0, 0.5, 0.25) * 4


class EffectiveSteps:
    """Steps a parameter whose gradient is always 1 as a client steps its own: the same optimizer, at the same rates.

    It starts at 0, without state and without weight decay, as clients do in every round. With plain SGD its way is the
    sum of the rates; with momentum, Nesterov and schedules it is what takes that sum's place: learning rate times
    ||a||_1 in FedNova (Wang et al. 2020), K eta_l in SCAFFOLD (Karimireddy et al. 2020). `pull` is FedProx's.
    """

    def __init__(self, optimizer: OptimizerFactory, pull: float = 0.0):
        self.optimizer, self.pull = optimizer, pull
        # Under a constant schedule there are few different rounds, and none has to be walked twice.
        self.displacement = lru_cache(maxsize=256)(self._displacement)

    def _displacement(self, lr_factors: tuple[float, ...], gradient: float = 1.0) -> float:
        """How far it gets in steps of these factors on the learning rate: positive, downhill."""
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = self.optimizer([parameter])
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = 0.0
        for factor in lr_factors:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            parameter.grad = gradient + self.pull * parameter.detach()
            step(optimizer)
        return -parameter.item()


def nonlinear_optimizer(name: str, optimizer: OptimizerFactory, clip: GradientClipper) -> list[str]:
    """Return the errors of choices with which a client's distance is not its gradients times measurable numbers."""
    errors = []
    if clip.settings:
        nulls = " ".join(f"{setting.split('=')[0]}=null" for setting in clip.settings)
        errors.append(
            f"{' '.join(clip.settings)} with algorithm={name}: a clipped gradient goes another way than the one that "
            f"is measured.\n  set {nulls}, or algorithm=fedavg"
        )
    if isinstance(optimizer, GroupedOptimizerFactory) and optimizer.lr_multipliers:
        errors.append(
            f"optimizer.lr_multipliers with algorithm={name}: what is measured is how far one parameter gets, and "
            "these take some further than others.\n  set optimizer.lr_multipliers=[], or algorithm=fedavg"
        )
    if error := _nonlinear_reason(optimizer):
        errors.append(
            f"algorithm={name} needs an optimizer whose step is linear in the gradient: {error}.\n"
            "  set optimizer=sgd or optimizer=momentum, or algorithm=fedavg"
        )
    return errors


def kept_state(name: str, client_optimizer_state: ClientOptimizerState) -> list[str]:
    """Return the error of clients that do not begin their rounds as the probe does."""
    if client_optimizer_state == "reset":
        return []
    return [
        f"algorithm.client_optimizer_state={client_optimizer_state} with algorithm={name}: how far a client gets is "
        "measured from an optimizer without state.\n"
        "  set algorithm.client_optimizer_state=reset, or algorithm=fedavg"
    ]


def _nonlinear_reason(optimizer: OptimizerFactory) -> str:
    """Why the probe's way would be of no use; empty when twice the gradient is twice the way."""
    kind = _name(optimizer)
    try:
        way, twice = (EffectiveSteps(optimizer).displacement(PROBE_FACTORS, gradient) for gradient in (1.0, 2.0))
    except Exception as error:
        return f"{kind} cannot step a single number ({str(error).splitlines()[0]})"
    same = abs(twice - 2 * way) <= 1e-9 * abs(twice)
    return "" if same else f"with {kind} twice the gradient is not twice the step"


def _name(optimizer: Any) -> str:
    make = optimizer.make if isinstance(optimizer, GroupedOptimizerFactory) else optimizer
    made = getattr(make, "func", make)
    return getattr(made, "__name__", str(made))
