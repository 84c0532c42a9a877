"""What a way of averaging gradients is, and the one that leaves them as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.topology import Topology
from trainer.optim import LossScaler


class GradientReducer(Protocol):
    """Abstract: averages the gradients of a silo's replicas, once a step, to the same bits on all of them.

    Its state is this replica's own, and a client's own, as an optimizer's is: what of the client's gradients it has not
    sent yet. Numbers that are not finite stay so, on all replicas alike.
    """

    def attach(self, ddp: DistributedDataParallel, topology: Topology, scaler: LossScaler) -> None:
        """Has the module average its gradients in this way. Forgets all state."""
        ...

    def encoded_size(self, gradients: Sequence[Tensor]) -> int:
        """The bytes of a replica's gradients on their way; of R replicas each sends 2 (R - 1) / R times as many."""
        ...

    def rollback(self) -> None:
        """The last step was left out, because it overflowed: the state is again as it was before."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The live state, as a tree of tensors and numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a `state_dict` back, whose tensors are not written to; an empty one begins anew."""
        ...

    def reshard(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What each replica goes on with where there were others: together they owe what those owed."""
        ...


class FullPrecisionReducer:
    """The gradients as they are: DistributedDataParallel's own mean. There is no state."""

    def attach(self, ddp: DistributedDataParallel, topology: Topology, scaler: LossScaler) -> None:
        pass

    def encoded_size(self, gradients: Sequence[Tensor]) -> int:
        return sum(gradient.nbytes for gradient in gradients)

    def rollback(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def reshard(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {}
