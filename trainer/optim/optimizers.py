"""Factories and steps of torch optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled  # pyright: ignore[reportPrivateImportUsage]
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# Makes an optimizer of parameters: a class of torch, a partial of one, or a GroupedOptimizerFactory. A factory may have
# `lr_multipliers`, which are not empty if learning rates differ, and `make`, the factory of the optimizer inside it.
OptimizerFactory = Callable[..., torch.optim.Optimizer]


def optimizer_name(make: Any) -> str:
    """Return the name of the class of the optimizers that a factory makes."""
    inner = getattr(make, "make", make)
    made = getattr(inner, "func", inner)
    return getattr(made, "__name__", str(made))


def step(optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer, with the same bits as `optimizer.step()`.

    Torch wraps `step` to record it in the profiler and to call hooks. The wrapper costs 35 to 90 microseconds on a CPU,
    up to a tenth of a small model's step, so it is skipped when there are neither.
    """
    wrapped = type(optimizer).step
    bare = getattr(wrapped, "__wrapped__", None) if getattr(wrapped, "hooked", False) else None
    if bare is None or _needs_wrapper(optimizer):
        optimizer.step()
    else:
        bare(optimizer)


def _needs_wrapper(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a profiler runs, hooks are registered, or this instance's step was replaced."""
    return bool(
        _profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or "step" in vars(optimizer)
    )


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer takes gradients at other weights than it has learnt, as schedule-free ones do.

    Their methods `train` and `eval` exchange the two in the parameters: Defazio et al. 2024 (arXiv 2405.15682).
    """
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


def enter_training(optimizer: torch.optim.Optimizer) -> None:
    """Put the weights in place at which gradients are taken, if they are not yet."""
    if has_modes(optimizer):
        optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]


def leave_training(optimizer: torch.optim.Optimizer) -> None:
    """Put the weights in place that are learnt: to evaluate, to combine with others, and to save."""
    if has_modes(optimizer):
        optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters in the order of the optimizer's groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def has_fused_step(kind: object, device: torch.device) -> bool:
    """Return whether the fused kernel of this optimizer class is faster; Adam's takes a third of the time."""
    # The classes of torch do not say whether they have a fused kernel, and for which devices.
    return kind in (torch.optim.Adam, torch.optim.AdamW) or (kind is torch.optim.SGD and device.type == "cuda")
