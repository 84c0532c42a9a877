"""Frozen parameters and buffers that nobody combines: equal everywhere at first, and then each rank's own."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.models.buffers import load_buffers
from trainer.models.flat import FlatModel
from trainer.utils.seeding import derive_seed


class LocalTensors:
    """Those tensors of a model that its training may move, and that belong to the rank: queues, pointers, teachers.

    Most never move, and are made again with the model. So checkpoints contain the others alone.

    Args:
        model: as it is before training.
        frozen_digest: a hash of the frozen parameters as they are before training, which checkpoints have in their
            place. Another one says that the run would continue on another model.
    """

    def __init__(self, model: FlatModel, frozen_digest: int):
        self.model = model
        self.initial = {name: _checksum(tensor) for name, tensor in model.local_tensors.items()}
        self.frozen_digest = frozen_digest

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live tensors that have moved on this rank, by name."""
        tensors = self.model.local_tensors
        return {name: tensor for name, tensor in tensors.items() if _checksum(tensor) != self.initial.get(name)}

    def state_dict_anywhere(self) -> tuple[dict[str, Tensor], bool]:
        """Return the live tensors that have moved on any rank, and whether there are any. A collective."""
        here = self.state_dict()
        made_later = here.keys() - self.initial.keys()  # in a forward pass of this rank
        flags = torch.tensor([*(name in here for name in self.initial), bool(made_later)], dtype=torch.int64)
        moved = collectives.all_reduce_max(flags).tolist()
        names = made_later | {name for name, flag in zip(self.initial, moved, strict=False) if flag}
        return {name: tensor for name, tensor in self.model.local_tensors.items() if name in names}, any(moved)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        parameters = dict(self.model.module.named_parameters())
        for name in parameters.keys() & state.keys():
            parameters[name].copy_(state[name])
        load_buffers(self.model.module, {name: tensor for name, tensor in state.items() if name not in parameters})


def digest(tensors: Mapping[str, Tensor]) -> int:
    """Return a 63-bit hash of the names, types, shapes and bits of tensors; 0 for none."""
    rows = [(name, str(tensor.dtype), list(tensor.shape), _checksum(tensor)) for name, tensor in tensors.items()]
    return derive_seed(json.dumps(sorted(rows))) if rows else 0


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(collectives.contiguous_bits(tensor).cpu().numpy().data)
