"""Steps and states of torch optimizers.

States are swapped between clients. `Optimizer.load_state_dict` would also overwrite the configured learning rate and
alias its argument; the functions here do neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled  # pyright: ignore[reportPrivateImportUsage]
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# Makes an optimizer of parameters: a class of torch, a partial of one, or a GroupedOptimizerFactory. A factory may have
# `lr_multipliers`, which are not empty if learning rates differ, and `make`, the factory of the optimizer inside it.
OptimizerFactory = Callable[..., torch.optim.Optimizer]


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


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters in the order of the optimizer's groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def has_fused_step(kind: object, device: torch.device) -> bool:
    """Return whether the fused kernel of this optimizer class is faster; Adam's takes a third of the time."""
    # The classes of torch do not say whether they have a fused kernel, and for which devices.
    return kind in (torch.optim.Adam, torch.optim.AdamW) or (kind is torch.optim.SGD and device.type == "cuda")


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the state by parameter position, {"0": {"momentum_buffer": tensor}, ...}, without copying tensors."""
    parameters = parameters_of(optimizer)
    return {str(i): dict(optimizer.state[p]) for i, p in enumerate(parameters) if p in optimizer.state}


def clone_state(state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Copy a state, including its tensors."""
    return {
        i: {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
        for i, entry in state.items()
    }


def restore_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Install a state, without copying tensors; an empty state resets the optimizer. Learning rates are unchanged."""
    parameters = parameters_of(optimizer)
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    moved: dict[Tensor, dict[str, Any]] = {}
    for parameter, entry in ((parameters[int(i)], entry) for i, entry in state.items()):
        moved[parameter] = _to_parameter_device(parameter, entry, id(parameter) in fused)
    optimizer.state = defaultdict(dict, _initial_adagrad_state(optimizer) | moved)


def _initial_adagrad_state(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Return the initial state of Adagrad; empty for other optimizers, which make theirs in the first step."""
    # Torch before 2.13 makes it in Adagrad's constructor, and fails in a step without it. Torch's optimizers have no
    # attribute or method that tells so, or that makes the state again: only the class does.
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    first = optimizer.defaults["initial_accumulator_value"]
    return {
        parameter: {
            "step": torch.zeros((), device=parameter.device if group["fused"] else None),
            "sum": torch.full_like(parameter, first, requires_grad=False),
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _to_parameter_device(parameter: Tensor, entry: dict[str, Any], is_fused: bool) -> dict[str, Any]:
    """Move an entry to the parameter's device, except step counters, unless a fused kernel reads them."""
    return {
        name: value.to(parameter.device) if isinstance(value, Tensor) and (value.dim() or is_fused) else value
        for name, value in entry.items()
    }
