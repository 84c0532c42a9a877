"""Loss scaling for float16, whose gradients would underflow."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.optim.optimizers import step


class LossScaler(Protocol):
    """Scales losses before backward, and steps the optimizer with unscaled gradients.

    loss_scale: the current factor on losses, a power of two.
    may_skip: whether steps may be skipped.
    """

    loss_scale: float
    may_skip: bool

    def scale(self, loss: Tensor) -> Tensor:
        """Scale a loss."""
        ...

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscale the gradients in place, before they are adjusted and clipped."""
        ...

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step the optimizer unless the gradients overflowed, and return whether it stepped."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the current client; empty without scaling."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`; an empty one resets the scale."""
        ...


class IdentityLossScaler:
    """No scaling."""

    loss_scale = 1.0
    may_skip = False

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        step(optimizer)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class DynamicLossScaler:
    """Scaling by `torch.amp.GradScaler`: a step whose gradients overflow is skipped, and the scale is lowered."""

    may_skip = True

    def __init__(self, device: torch.device):
        self.scaler = torch.amp.GradScaler(device.type)
        self.initial_state = self.scaler.state_dict()
        self.loss_scale = self.scaler.get_scale()

    def scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        scale = self.loss_scale
        self.scaler.step(optimizer)
        self.scaler.update()
        self.loss_scale = self.scaler.get_scale()
        return self.loss_scale >= scale

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state or self.initial_state)
        self.loss_scale = self.scaler.get_scale()
