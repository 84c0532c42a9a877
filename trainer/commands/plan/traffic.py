"""The bytes that go between ranks, by whom they are sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.commands.plan.cost_model import Costs, Load
from trainer.distributed.topology import slices_of


@dataclass(frozen=True)
class Sent:
    """Bytes that are sent: by the rank and by the silo that send most, and by all together."""

    rank: float
    silo: float
    all: float

    def times(self, count: int) -> Sent:
        """The same, so many times."""
        return Sent(self.rank * count, self.silo * count, self.all * count)


def in_ring(size: int, members: int) -> float:
    """The bytes that each member sends in a ring all-reduce of a vector of this size.

    >>> in_ring(100, 4)
    150.0
    """
    return 2 * (members - 1) / members * size


def averaging(costs: Costs) -> Sent:
    """Inside silos, in a step: the gradients."""
    return _most(costs, lambda load: load.replicas * in_ring(costs.traffic.gradients, load.replicas))


def joining(costs: Costs) -> Sent:
    """Inside silos, at the end of a round: each replica gets what others have of the vectors that were combined."""
    return _most(costs, lambda load: costs.traffic.joined * (load.replicas - 1))


def between(costs: Costs) -> Sent:
    """Between silos, at the end of a round: what `bytes_between_silos` grows by."""
    silo = costs.traffic.between / len(costs.loads)
    return Sent(silo / slices_of(costs.silo_sizes), silo, costs.traffic.between)


def _most(costs: Costs, of_silo: Callable[[Load], float]) -> Sent:
    """Sums over silos, all of whose ranks send alike."""
    silos = [of_silo(load) for load in costs.loads]
    rank = max(sent / load.replicas for sent, load in zip(silos, costs.loads, strict=True))
    return Sent(rank, max(silos), sum(silos))
