"""The interface of gradient reducers, and the one that averages gradients as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.topology import Topology
from trainer.optim import LossScaler


class GradientReducer(Protocol):
    """Abstract: averages the gradients of a silo's replicas in each step; all replicas get the same bits.

    The state is that of a replica and a client, like that of an optimizer: the part of the client's gradients that was
    not sent yet. Gradients that are not finite stay so, on all replicas.

    Attributes:
        takes_sparse: whether gradients may be sparse tensors.
        takes_parts: whether each rank may get the mean of a part of the model alone.
        reduce_dtype: in which the gradients of a part are sent and summed; None: in their own.
    """

    takes_sparse: bool = False
    takes_parts: bool = False
    reduce_dtype: torch.dtype | None = None

    def attach(self, ddp: DistributedDataParallel, topology: Topology, scaler: LossScaler) -> None:
        """Register the reducer as the module's communication hook, with an empty state."""
        ...

    def encoded_size(self, gradients: Sequence[Tensor]) -> int:
        """Return the bytes n of a replica's gradients, compressed; each of R replicas sends 2 (R - 1) / R n."""
        ...

    def rollback(self) -> None:
        """Restore the state before the last step, which was skipped because of an overflow."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the live state, as a tree of tensors and numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`, whose tensors are not written to; an empty one resets the state."""
        ...

    def reshard(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state of each replica in a silo of another size, from those of all replicas before."""
        ...


class StatelessReducer:
    """Base of reducers without a state."""

    takes_sparse = False
    takes_parts = True
    reduce_dtype: torch.dtype | None = None

    def rollback(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def reshard(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {}


class FullPrecisionReducer(StatelessReducer):
    """The all-reduce of DistributedDataParallel itself."""

    takes_sparse = True

    def attach(self, ddp: DistributedDataParallel, topology: Topology, scaler: LossScaler) -> None:
        pass

    def encoded_size(self, gradients: Sequence[Tensor]) -> int:
        return sum(gradient.nbytes for gradient in gradients)
