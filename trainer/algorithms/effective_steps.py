"""Effective local steps: the distance that an optimizer covers, by which SCAFFOLD and FedNova divide."""

from __future__ import annotations

from functools import lru_cache

import torch

from trainer.optim import GradientClipper, step
from trainer.optim.optimizers import OptimizerFactory, enter_training, leave_training, optimizer_name

# Factors on the learning rate of the steps by which linearity is tested: RAdam's first five are plain momentum.
PROBE_FACTORS = (1.0, 0.5, 0.25) * 4


class EffectiveSteps:
    """Measures the displacement of a parameter whose gradient is always 1, with the clients' optimizer and rates.

    It starts at 0, without state and without weight decay, as clients do in every round. With plain SGD the
    displacement is the sum of the learning rates; with momentum, Nesterov and schedules it takes the place of that sum:
    learning rate times ||a||_1 in FedNova (Wang et al. 2020), K eta_l in SCAFFOLD (Karimireddy et al. 2020).

    Args:
        optimizer: makes the optimizer of the clients.
        proximal_mu: FedProx's mu.
    """

    def __init__(self, optimizer: OptimizerFactory, proximal_mu: float = 0.0):
        self.optimizer, self.proximal_mu = optimizer, proximal_mu
        # Under a constant schedule there are few different rounds, and none has to be measured twice.
        self.displacement = lru_cache(maxsize=256)(self._displacement)

    def _displacement(self, lr_factors: tuple[float, ...], gradient: float = 1.0) -> float:
        """Return the displacement, positive, after steps with these factors on the learning rate."""
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = self.optimizer([parameter])
        base_lrs = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = 0.0
        enter_training(optimizer)
        for factor in lr_factors:
            for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = lr * factor
            parameter.grad = gradient + self.proximal_mu * parameter.detach()
            step(optimizer)
        leave_training(optimizer)
        return -parameter.item()


def nonlinear_optimizer(name: str, optimizer: OptimizerFactory, clip: GradientClipper) -> list[str]:
    """Return the errors of choices with which a client's displacement is not linear in its gradients."""
    errors: list[str] = []
    if clip.settings:
        nulls = " ".join(f"{setting.split('=')[0]}=null" for setting in clip.settings)
        errors.append(
            f"{' '.join(clip.settings)} with algorithm={name}: the measured displacement is that of gradients which "
            f"are not clipped.\n  set {nulls}, or algorithm=fedavg"
        )
    if getattr(optimizer, "lr_multipliers", ()):
        errors.append(
            f"optimizer.lr_multipliers with algorithm={name}: the displacement is measured with one learning rate "
            "for all parameters.\n  set optimizer.lr_multipliers=[], or algorithm=fedavg"
        )
    if error := _nonlinear_reason(optimizer):
        errors.append(
            f"algorithm={name} needs an optimizer whose step is linear in the gradient: {error}.\n"
            "  set optimizer=sgd or optimizer=momentum, or algorithm=fedavg"
        )
    return errors


def moving_momentum(name: str, moves_momentum: bool) -> list[str]:
    """Return the error of a schedule that moves the momentum, while a displacement is measured with the first one."""
    if not moves_momentum:
        return []
    return [
        f"schedule= moves the momentum, with algorithm={name}: the displacement is measured with one momentum.\n"
        "  set schedule.base_momentum=null schedule.max_momentum=null, another schedule, or algorithm=fedavg"
    ]


def _nonlinear_reason(optimizer: OptimizerFactory) -> str:
    """Return why the displacement is not linear in the gradient; empty if twice the gradient doubles it."""
    kind = optimizer_name(optimizer)
    try:
        once, twice = (EffectiveSteps(optimizer).displacement(PROBE_FACTORS, gradient) for gradient in (1.0, 2.0))
    except Exception as error:
        return f"{kind} cannot step a single number ({str(error).splitlines()[0]})"
    same = abs(twice - 2 * once) <= 1e-9 * abs(twice)
    return "" if same else f"with {kind} twice the gradient is not twice the step"
