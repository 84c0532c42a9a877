"""The exponential moving average of the weights, which is evaluated and kept beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.models.flat import FlatModel


class ExponentialMovingAverage:
    """average <- decay average + (1 - decay) weights, each time that the global weights have moved.

    Tarvainen and Valpola 2017 (arXiv 1703.01780); it begins as the initial weights. Averaged are the parameters that
    travel, as one vector of at least float32; frozen and personal parameters and all buffers, such as the statistics of
    BatchNorm, are the model's own.
    """

    def __init__(self, model: FlatModel, decay: float):
        self.model, self.decay = model, decay
        self.vector = model.shared.to(torch.promote_types(model.shared.dtype, torch.float32), copy=True)

    def update(self) -> None:
        """Takes in the weights that the model has now."""
        self.vector.lerp_(self.model.shared.to(self.vector.dtype), 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Meanwhile the average is in the place of the model's weights."""
        weights = self.model.shared.clone()
        self.model.shared.copy_(self.vector)
        try:
            yield
        finally:
            self.model.shared.copy_(weights)

    def state_dict(self) -> dict[str, Tensor]:
        """The live averages by the names of the parameters."""
        return self.model.named_views(self.vector)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts a `state_dict` back."""
        for name, view in self.state_dict().items():
            view.copy_(state[name])
