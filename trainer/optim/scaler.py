"""How the loss is scaled: not at all, or up and down for float16, which overflows."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.optim.stepping import step


class LossScaler(Protocol):
    """Abstract: scales what backward starts from, and steps the optimizer with gradients of the right size.

    loss_scale  by what losses are multiplied now: a power of two
    may_skip    whether steps may be left out
    """

    loss_scale: float
    may_skip: bool

    def scale(self, share: Tensor) -> Tensor:
        """What backward starts from, scaled."""
        ...

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives the gradients their right size, before they are corrected and clipped."""
        ...

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Steps the optimizer; whether it did, and did not leave the step out because it overflowed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The scale of the client that trains; empty when there is none."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a `state_dict` back; an empty one begins anew."""
        ...


class IdentityLossScaler:
    """Gradients as they are."""

    loss_scale = 1.0
    may_skip = False

    def scale(self, share: Tensor) -> Tensor:
        return share

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
    """Losses scaled up before backward; a step that overflowed all the same is left out, and the scale lowered."""

    may_skip = True

    def __init__(self, device: torch.device):
        self.scaler = torch.amp.GradScaler(device.type)
        self.initial_state = self.scaler.state_dict()
        self.loss_scale = self.scaler.get_scale()

    def scale(self, share: Tensor) -> Tensor:
        return self.scaler.scale(share)

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
