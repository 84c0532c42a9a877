"""The bytes that go between ranks, by whom they are sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.commands.plan.cost_model import CostModel, SiloLoad
from trainer.distributed.topology import count_shards


@dataclass(frozen=True)
class SentBytes:
    """Bytes that are sent: by the rank and by the silo that send most, and by all together."""

    rank: float
    silo: float
    all: float

    def scaled(self, count: int) -> SentBytes:
        """The same, so many times."""
        return SentBytes(self.rank * count, self.silo * count, self.all * count)


def in_ring(size: int, members: int) -> float:
    """The bytes that each member sends in a ring all-reduce of a vector of this size.

    >>> in_ring(100, 4)
    150.0
    """
    return 2 * (members - 1) / members * size


def gradient_traffic(costs: CostModel) -> SentBytes:
    """Inside silos, in a step: the gradients."""
    return _most(costs, lambda load: load.replicas * in_ring(costs.traffic.gradients, load.replicas))


def all_gather_traffic(costs: CostModel) -> SentBytes:
    """Inside silos, at the end of a round: each replica gets what others have of the vectors that were combined."""
    return _most(costs, lambda load: costs.traffic.all_gathered * (load.replicas - 1))


def inter_silo_traffic(costs: CostModel) -> SentBytes:
    """Between silos, at the end of a round: what `bytes_between_silos` grows by."""
    silo = costs.traffic.inter_silo / len(costs.loads)
    return SentBytes(silo / count_shards(costs.silo_sizes), silo, costs.traffic.inter_silo)


def _most(costs: CostModel, of_silo: Callable[[SiloLoad], float]) -> SentBytes:
    """Sums over silos, all of whose ranks send alike."""
    silos = [of_silo(load) for load in costs.loads]
    rank = max(sent / load.replicas for sent, load in zip(silos, costs.loads, strict=True))
    return SentBytes(rank, max(silos), sum(silos))
