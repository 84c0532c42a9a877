"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.models.flat import FlatModel


class ExponentialMovingAverage:
    """average <- decay * average + (1 - decay) * weights, after every change of the global weights.

    Tarvainen and Valpola 2017 (arXiv 1703.01780). The average starts at the initial weights and is kept in float32 or
    better. It covers the shared parameters; frozen and personal parameters and all buffers, such as BatchNorm
    statistics, are those of the model.
    """

    def __init__(self, model: FlatModel, decay: float):
        self.model, self.decay = model, decay
        self.vector = model.shared.to(torch.promote_types(model.shared.dtype, torch.float32), copy=True)

    def update(self) -> None:
        """Update the average with the current weights."""
        self.vector.lerp_(self.model.shared.to(self.vector.dtype), 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Replace the model's weights by the average within the context."""
        weights = self.model.shared.clone()
        self.model.shared.copy_(self.vector)
        try:
            yield
        finally:
            self.model.shared.copy_(weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, as views."""
        return self.model.named_views(self.vector)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` into the average."""
        for name, view in self.state_dict().items():
            view.copy_(state[name])
