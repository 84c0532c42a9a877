"""What a run costs, as far as it was measured or told: what the forecast reckons with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from statistics import median


@dataclass(frozen=True)
class StageTimes:
    """What one rank takes for its part of a round, in seconds, with nothing sent.

    step         of the optimizer, with its share of the batch
    client       besides its steps: begun with the global parameters, ended with its delta
    combination  of what the silos have brought, and the server's step
    """

    step: float
    client: float
    combination: float


STAGES = [part.name for part in fields(StageTimes)]


@dataclass(frozen=True)
class SiloLoad:
    """What a silo does in a round. steps and examples are those of all its clients."""

    replicas: int
    clients: int
    steps: int
    examples: int


@dataclass(frozen=True)
class Traffic:
    """Bytes.

    gradients  of one replica, which are averaged over its silo every step
    all_gathered     of the vectors that a silo makes whole on all its replicas, every round
    inter_silo    sent by all silos together, every round
    """

    gradients: int
    all_gathered: int
    inter_silo: int


@dataclass(frozen=True)
class CompressionCost:
    """What an uplink makes of a round: bytes that all silos send between them, a rank's seconds of packing."""

    inter_silo_bytes: int
    seconds: float


@dataclass(frozen=True)
class LinkSpeed:
    """A link. bandwidth: bytes a second that one end sends. latency: seconds of a sum of one number over all ends."""

    bandwidth: float
    latency: float
    is_measured: bool


@dataclass(frozen=True)
class CostModel:
    """All that a round's time comes of.

    loads        by silo
    stage_times        by the number of replicas of a silo
    intra_silo       the link between replicas of a silo; None where no silo has two
    inter_silo      that of a silo to the others; None where there is one silo
    rounds       of the run
    averaging    seconds a step that the mean of the gradients takes, by the number of replicas, where it was measured
    uplink       the name of the run's; empty if nothing goes over it
    compression_costs     by uplink, of those that the run can have
    overlap      steps of the next round in which what silos send may be under way
    can_overlap  whether another algorithm would do the same with more of them
    """

    loads: tuple[SiloLoad, ...]
    stage_times: dict[int, StageTimes]
    traffic: Traffic
    intra_silo: LinkSpeed | None
    inter_silo: LinkSpeed | None
    rounds: int
    averaging: dict[int, float] = field(default_factory=dict)
    uplink: str = ""
    compression_costs: dict[str, CompressionCost] = field(default_factory=dict)
    overlap: int = 0
    can_overlap: bool = False

    @property
    def silo_sizes(self) -> tuple[int, ...]:
        return tuple(load.replicas for load in self.loads)

    def with_uplink(self, name: str) -> CostModel:
        """The same run with another uplink."""
        return replace(
            self, uplink=name, traffic=replace(self.traffic, between=self.compression_costs[name].inter_silo_bytes)
        )


def slowest_stage_times(ranks: Iterable[Iterable[StageTimes]]) -> StageTimes:
    """That of ranks which wait for each other, from what each took round by round: the slowest's, in the median round.

    Not the slowest in the median: ranks of which now the one and now the other is slow are late more often than each.
    """
    rounds = list(zip(*ranks, strict=False))
    return StageTimes(*(median(max(getattr(pace, name) for pace in round) for round in rounds) for name in STAGES))
