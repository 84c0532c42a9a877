"""Frozen parameters and buffers that nobody combines: equal everywhere at first, and then each rank's own."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.distributed.collectives import contiguous_bits
from trainer.models.buffers import load_buffers
from trainer.models.flat import FlatModel


class LocalTensors:
    """Those tensors of a model that its training may move, and that belong to the rank: queues, pointers, teachers.

    Most never move, and are made again with the model. So checkpoints contain the others alone.

    Args:
        model: as it is before training.
    """

    def __init__(self, model: FlatModel):
        self.model = model
        self.initial = {name: _checksum(tensor) for name, tensor in model.local_tensors.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live tensors that have moved, by name."""
        tensors = self.model.local_tensors
        return {name: tensor for name, tensor in tensors.items() if _checksum(tensor) != self.initial.get(name)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        parameters = dict(self.model.module.named_parameters())
        for name in parameters.keys() & state.keys():
            parameters[name].copy_(state[name])
        load_buffers(self.model.module, {name: tensor for name, tensor in state.items() if name not in parameters})


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(contiguous_bits(tensor).cpu().numpy())
