"""How the silos of a run come together: initial parameters, sums of scalars, and the combination of a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.algorithms.base import Metrics, RoundSession, RunSession
from trainer.algorithms.round import Round
from trainer.distributed import collectives
from trainer.distributed.compression import UpdateCompression
from trainer.distributed.sharding import ParallelModel, is_without_values
from trainer.distributed.topology import Topology
from trainer.distributed.transport import Transport, make_transport
from trainer.loop.local_tensors import digest
from trainer.models.flat import frozen_tensors
from trainer.utils.errors import InputError
from trainer.utils.seeding import derive_seed

Scalars = dict[str, float]
Tables = dict[str, Tensor]
StateTree = Mapping[str, Any]  # of tensors, numbers and texts

# Begins the names of tables with a row for each rank of this world. They are summed over this world alone.
RANKS = "ranks/"
# A scalar that a silo sets to 1 when it brings a round that it has not finished.
UNFINISHED = "unfinished"
# The number of clients that are left out of a round, because their numbers are not finite.
LEFT_OUT = "left_out"
# Ends the names of tables in which each rank has rows of its own. Rows of zeros say nothing, and their order does not
# either: those of several launches are put one below the other.
ROWS = " rows"


@dataclass(frozen=True)
class Combined:
    """The result of a combination.

    Attributes:
        sums: the scalars of all silos, summed.
        tables: the float64 tables of all silos, summed.
        metrics: of the algorithm; None if a silo had not finished its work, and nothing was combined.
        met: the reading of `perf_counter` when all silos had come.
    """

    sums: Scalars
    tables: Tables
    metrics: Metrics | None
    met: float


class Exchange(Protocol):
    """How the silos of a run come together. Every rank makes the same calls.

    Attributes:
        averages_personal: whether clients that are new begin with the mean of the others' personal parameters.
    """

    averages_personal: bool

    @property
    def transport(self) -> Transport:
        """The transport of vectors between the silos of this world."""
        ...

    def start(self, parallel: ParallelModel, digests: tuple[int, int]) -> int:
        """Make the parameters and buffers of all silos equal. A collective.

        Args:
            parallel: the model of this silo.
            digests: the `model_digests` of its module.

        Returns:
            The digest of the frozen parameters that all have now.

        Raises:
            InputError: their parameters have other shapes; on every rank.
        """
        ...

    def catch_up(self, rounds: int, make_state: Callable[[], StateTree]) -> StateTree | None:
        """Return the state from which this silo continues, if the others went on without it; None if they did not.

        Args:
            rounds: the number of rounds that this silo has done.
            make_state: returns the state of this silo, for others that are late.
        """
        ...

    def sum(self, name: str, scalars: Scalars, tables: Mapping[str, Tensor]) -> tuple[Scalars, Tables]:
        """Sum scalars and float64 tables over everything that trains, exactly the same on every rank. A collective.

        Args:
            name: of the sum; no other one of the run has it.
            scalars: this rank's.
            tables: this rank's.
        """
        ...

    def combine(
        self,
        algorithm: RunSession,
        session: RoundSession,
        round: Round,
        scalars: Scalars,
        tables: Mapping[str, Tensor],
    ) -> Combined:
        """Sum scalars and tables, and then move the global model, unless a silo is unfinished. A collective.

        Args:
            algorithm: at work on the model of this silo.
            session: this silo's part of the round.
            round: the round.
            scalars: this rank's, those of the session among them.
            tables: this rank's.
        """
        ...


# Makes an exchange for ranks, the compression between silos, and the start and shape of each parameter in a vector.
ExchangeFactory = Callable[[Topology, UpdateCompression, Sequence[tuple[int, torch.Size]]], Exchange]


def model_digests(module: nn.Module) -> tuple[int, int]:
    """Return digests of the frozen parameters, 0 where another rank has them, and of all names and shapes."""
    shapes = [(name, list(parameter.shape)) for name, parameter in module.named_parameters()]
    frozen = 0 if is_without_values(module) else digest(frozen_tensors(module))
    return frozen, derive_seed(str(shapes))


class InWorld:
    """All silos are ranks of one world, and meet in its process groups."""

    averages_personal = True

    def __init__(self, topology: Topology, compression: UpdateCompression, layout: Sequence[tuple[int, torch.Size]]):
        self.transport: Transport = make_transport(topology, compression, layout)

    def start(self, parallel: ParallelModel, digests: tuple[int, int]) -> int:
        frozen, shapes = digests
        highest, lowest = collectives.all_reduce_max(torch.tensor([[frozen, shapes], [-frozen, -shapes]]))
        same_frozen, same_shapes = (highest == -lowest).tolist()
        if not same_shapes:
            raise InputError(
                "model= has parameters of other shapes on some ranks than on others.\n"
                "  start all of them with the same keys; model.prune needs the same file model.init on all nodes"
            )
        # Frozen parameters are gigabytes, of a file that every rank has read.
        parallel.broadcast(lambda parameter: parameter.requires_grad or not same_frozen)
        return int(collectives.broadcast(torch.tensor(frozen)))

    def catch_up(self, rounds: int, make_state: Callable[[], StateTree]) -> StateTree | None:
        return None  # no silo goes on without another

    def sum(self, name: str, scalars: Scalars, tables: Mapping[str, Tensor]) -> tuple[Scalars, Tables]:
        return collectives.all_reduce_scalars(scalars, tables)

    def combine(
        self,
        algorithm: RunSession,
        session: RoundSession,
        round: Round,
        scalars: Scalars,
        tables: Mapping[str, Tensor],
    ) -> Combined:
        # The scalars go first: they say who takes part, and what share of the whole each silo has.
        sums, tables = self.sum(f"rounds/{round.index}/training", scalars, tables)
        met = perf_counter()
        if sums[UNFINISHED]:
            return Combined(sums, tables, None, met)
        self.transport.start_round(round.seed_for)
        return Combined(sums, tables, session.aggregate(sums), met)
