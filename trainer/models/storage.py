"""Where the parameters of a module are: whole in its memory, or in parts on several ranks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.models.boxes import Box, whole_box


class ParameterStorage(Protocol):
    """The memory of a module's parameters, which a FlatModel replaces by its vectors."""

    def is_repeated(self, parameter: nn.Parameter) -> bool:
        """Return whether ranks with other parts of the same copy hold the same region of a parameter too."""
        ...

    def box(self, parameter: nn.Parameter) -> Box:
        """Return the region of a parameter that this rank holds."""
        ...

    def room(self, parameter: nn.Parameter) -> int:
        """Return how many numbers of a vector the region takes, with what pads it."""
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """Return the live values of this rank's region of a parameter, or a buffer as it is."""
        ...

    def bind(self, parameter: nn.Parameter, memory: Tensor) -> nn.Parameter:
        """Move this rank's region into a vector of its room, once; return it as a parameter over that memory.

        Only before DistributedDataParallel wraps its module.
        """
        ...


class WholeStorage:
    """Parameters that every rank holds whole."""

    def is_repeated(self, parameter: nn.Parameter) -> bool:
        return False

    def box(self, parameter: nn.Parameter) -> Box:
        return whole_box(parameter.shape)

    def room(self, parameter: nn.Parameter) -> int:
        return parameter.numel()

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @torch.no_grad()
    def bind(self, parameter: nn.Parameter, memory: Tensor) -> nn.Parameter:
        view = memory.view_as(parameter)
        view.copy_(parameter)
        rebind_parameter(parameter, view)
        return parameter


def rebind_parameter(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter other values, of any type and shape. Only before DistributedDataParallel wraps its module."""
    parameter.data = values


def cast_parameter(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Give a parameter another type. Only before DistributedDataParallel wraps its module."""
    rebind_parameter(parameter, parameter.data.to(dtype))
