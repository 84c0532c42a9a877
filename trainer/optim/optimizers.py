"""The state of a torch optimizer as a value: taken out, put back, swapped between clients, never mixed with its rates.

`Optimizer.load_state_dict` would also overwrite the configured learning rate and alias what it is given; these do not.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters in the order of the optimizer's groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The live state by the parameter's position: {"0": {"momentum_buffer": tensor}, ...}. Nothing is copied."""
    parameters = parameters_of(optimizer)
    return {str(i): dict(optimizer.state[p]) for i, p in enumerate(parameters) if p in optimizer.state}


def clone_state(state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A copy that shares no tensor with the original."""
    return {
        i: {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
        for i, entry in state.items()
    }


def restore_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Makes `state` the optimizer's own; an empty one resets it. Rates stay as they are."""
    parameters = parameters_of(optimizer)
    placed = {parameters[int(i)]: _beside(parameters[int(i)], entry) for i, entry in state.items()}
    optimizer.state = defaultdict(dict, placed)


def _beside(parameter: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its tensors on the parameter's device; counters of steps stay where they are."""
    return {
        name: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
        for name, value in entry.items()
    }
