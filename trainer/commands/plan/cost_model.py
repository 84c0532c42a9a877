"""What a run costs, as far as it was measured or told: what the forecast reckons with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from statistics import median


@dataclass(frozen=True)
class Pace:
    """What one rank takes for its part of a round, in seconds, with nothing sent.

    step         of the optimizer, with its share of the batch
    client       besides its steps: begun with the global parameters, ended with its delta
    combination  of what the silos have brought, and the server's step
    """

    step: float
    client: float
    combination: float


PARTS = [part.name for part in fields(Pace)]


@dataclass(frozen=True)
class Load:
    """What a silo does in a round. steps and examples are those of all its clients."""

    replicas: int
    clients: int
    steps: int
    examples: int


@dataclass(frozen=True)
class Traffic:
    """Bytes.

    gradients  of one replica, which are averaged over its silo every step
    joined     of the vectors that a silo makes whole on all its replicas, every round
    between    sent by all silos together, every round
    """

    gradients: int
    joined: int
    between: int


@dataclass(frozen=True)
class Packing:
    """What an uplink makes of a round: bytes that all silos send between them, a rank's seconds of packing."""

    between: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """A link. bandwidth: bytes a second that one end sends. latency: seconds of a sum of one number over all ends."""

    bandwidth: float
    latency: float
    is_measured: bool


@dataclass(frozen=True)
class Costs:
    """All that a round's time comes of.

    loads        by silo
    paces        by the number of replicas of a silo
    inside       the link between replicas of a silo; None where no silo has two
    between      that of a silo to the others; None where there is one silo
    rounds       of the run
    averaging    seconds a step that the mean of the gradients takes, by the number of replicas, where it was measured
    uplink       the name of the run's; empty if nothing goes over it
    packings     by uplink, of those that the run can have
    overlap      steps of the next round in which what silos send may be under way
    can_overlap  whether another algorithm would do the same with more of them
    """

    loads: tuple[Load, ...]
    paces: dict[int, Pace]
    traffic: Traffic
    inside: Line | None
    between: Line | None
    rounds: int
    averaging: dict[int, float] = field(default_factory=dict)
    uplink: str = ""
    packings: dict[str, Packing] = field(default_factory=dict)
    overlap: int = 0
    can_overlap: bool = False

    @property
    def silo_sizes(self) -> tuple[int, ...]:
        return tuple(load.replicas for load in self.loads)

    def with_uplink(self, name: str) -> Costs:
        """The same run with another uplink."""
        return replace(self, uplink=name, traffic=replace(self.traffic, between=self.packings[name].between))


def pace_of(ranks: Iterable[Iterable[Pace]]) -> Pace:
    """That of ranks which wait for each other, from what each took round by round: the slowest's, in the median round.

    Not the slowest in the median: ranks of which now the one and now the other is slow are late more often than each.
    """
    rounds = list(zip(*ranks, strict=False))
    return Pace(*(median(max(getattr(pace, name) for pace in round) for round in rounds) for name in PARTS))
