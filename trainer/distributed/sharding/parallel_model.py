"""A model that the ranks of a silo hold and train together, and the case in which each of them holds all of it.

parallel = parallelize(module, topology, options)
model = FlatModel(module, storage=parallel)
parallel.broadcast()
parallel.wrap(reducer, scaler)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from trainer.distributed import collectives
from trainer.distributed.gradients.base import GradientReducer
from trainer.distributed.gradients.ddp import no_sync, wrap_ddp
from trainer.distributed.topology import Topology
from trainer.models.storage import ParameterStorage, WholeStorage
from trainer.optim import LossScaler


class ParallelModel(ParameterStorage, Protocol):
    """A module that the ranks of a silo hold and train together, and the storage of its parameters.

    Attributes:
        module: it is evaluated as it is, and trained after `wrap`.
        forwards_together: whether a forward pass is a collective of the silo, so that all ranks must make as many.
    """

    module: nn.Module
    forwards_together: bool

    def broadcast(self, is_sent: Callable[[nn.Parameter], bool]) -> None:
        """Give all ranks of the world the buffers, and some of the parameters, of rank 0. A collective.

        It comes after the storage is bound.

        Args:
            is_sent: whether a parameter is sent to ranks that have values of their own.
        """
        ...

    def wrap(
        self, reducer: GradientReducer, scaler: LossScaler, allow_unused: bool
    ) -> tuple[nn.Module, GradientReducer]:
        """Return the module to train with, whose gradients are the mean over the silo, and the reducer that it uses.

        Args:
            reducer: averages the gradients, if there is anything to choose.
            scaler: of the loss.
            allow_unused: whether parameters may be left without a gradient.
        """
        ...

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context for the backward passes of all micro-batches of a step but the last."""
        ...

    def alone(self) -> AbstractContextManager[None]:
        """Return a context in which passes communicate with no one, and need as much memory; their values are void."""
        ...

    def take_gradients(self) -> None:
        """Give the bound parameters their gradients, after the last backward pass of a step."""
        ...


class ReplicatedModel(WholeStorage):
    """A module that every rank of the silo holds whole: DistributedDataParallel if there are several.

    Args:
        module: on the device of the topology.
        topology: of this rank.
    """

    forwards_together = False

    def __init__(self, module: nn.Module, topology: Topology):
        self.module, self.topology = module, topology
        self._wrapped = module

    def broadcast(self, is_sent: Callable[[nn.Parameter], bool]) -> None:
        for tensor in (*filter(is_sent, self.module.parameters()), *self.module.buffers()):
            collectives.broadcast(tensor)

    def wrap(
        self, reducer: GradientReducer, scaler: LossScaler, allow_unused: bool
    ) -> tuple[nn.Module, GradientReducer]:
        self._wrapped, used = wrap_ddp(self.module, self.topology, reducer, scaler, allow_unused)
        return self._wrapped, used

    def no_sync(self) -> AbstractContextManager[None]:
        return no_sync(self._wrapped)

    def alone(self) -> AbstractContextManager[None]:
        return no_sync(self._wrapped)

    def take_gradients(self) -> None:
        pass
