"""The global parameters of a run, the server optimizer that moves them, and the model that they are copied into."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.algorithms.server_optimizer import ServerOptimizer
from trainer.distributed.transport import Transport
from trainer.distributed.transport.base import ReducedChunks, shift_slice
from trainer.models.flat import FlatModel, blocks_of, pad_or_trim
from trainer.optim.optimizers import OptimizerFactory

Correction = Callable[[slice, Tensor], None]


class GlobalModel:
    """The vector of global parameters, in at least float32 whatever precision the model trains in.

    Attributes:
        model: the module that clients train.
        transport: sums vectors over the silos.
        parameters: the global parameters [n].
        parts: those parts of the vector that this rank moves.
        in_model: whether the model holds the global parameters now.
    """

    def __init__(self, model: FlatModel, transport: Transport, server: OptimizerFactory, parts: Sequence[slice]):
        self.model, self.transport, self.parts = model, transport, parts
        self.parameters = model.shared.to(torch.promote_types(model.shared.dtype, torch.float32), copy=True)
        self.moves_all = sum(part.stop - part.start for part in parts) == len(self.parameters)
        self.server = ServerOptimizer(server, self.parameters, parts)
        self.in_model = True

    def move(self, chunks: ReducedChunks, correct: Correction | None = None, fragment: slice | None = None) -> float:
        """Move the global parameters, and the model, by mean updates as they come in. A collective.

        Args:
            chunks: parts of the vector and the mean update there, in the order of their arrival.
            correct: edits the update of a block in place before the server optimizer takes it.
            fragment: is moved alone, and the model stays as it is; None: all.

        Returns:
            The 2-norm of the mean update, uncorrected.
        """
        squares = 0.0
        for part, total in chunks:
            for block in blocks_of(self.parameters, part):  # each while it is in the processor's cache
                update = total[shift_slice(block, -part.start)]
                squares += float(torch.linalg.vector_norm(update)) ** 2
                if correct:
                    correct(block, update)
                self.server.step(block, update)
                if fragment is None:
                    self.model.shared[block].copy_(self.parameters[block])
        moved = fragment or slice(0, len(self.parameters))
        self.transport.all_gather(self.parameters[moved], moved.start)
        self.in_model = self.moves_all and fragment is None
        return math.sqrt(self.transport.all_reduce_in_silo(squares))

    def load_into_model(self, start: Tensor) -> None:
        """Copy the parameters that a client begins with into the model, which it is about to change."""
        if not (self.in_model and start is self.parameters):
            self.model.shared.copy_(start)
        self.in_model = False

    def reset_model(self) -> None:
        """Copy the global parameters into the model, unless they are there."""
        if not self.in_model:
            self.model.shared.copy_(self.parameters)
            self.in_model = True

    def set(self, parameters: Tensor) -> None:
        """Copy other global parameters into place, and leave the model as it is."""
        self.parameters.copy_(pad_or_trim(parameters, len(self.parameters)))
        self.in_model = False

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters, unless a model of the same precision holds the same numbers."""
        return {} if self.parameters.dtype == self.model.shared.dtype else {"parameters": self.parameters}

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the state of the server optimizer for this rank's parts."""
        return {"server": self.server.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both. The model must hold the global parameters already."""
        self.set(state.get("parameters", self.model.shared))
        self.in_model = True
        self.server.load_state_dict(state["server"])
