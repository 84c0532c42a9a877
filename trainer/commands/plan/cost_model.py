"""Cost model of a round: seconds and bytes, from measured times and links."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, replace
from statistics import median

from trainer.distributed.silos import count_shards

# Bytes that DistributedDataParallel averages at once: its first bucket, and the others.
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20


@dataclass(frozen=True)
class StageTimes:
    """Seconds that one rank takes for the stages of a round, without communication.

    Attributes:
        step: an optimizer step with the rank's share of the batch.
        client: overhead of a client besides its steps: loading the global parameters, computing its update.
        aggregation: aggregating the updates of the silos, and the server's step.
    """

    step: float
    client: float
    aggregation: float


@dataclass(frozen=True)
class SiloLoad:
    """Work of a silo in a round. `steps` and `examples` are totals over its clients."""

    replicas: int
    clients: int
    steps: int
    examples: int


@dataclass(frozen=True)
class Traffic:
    """Sizes of the vectors of a round, in bytes.

    Attributes:
        gradients: gradients of one replica, averaged over its silo in every step.
        all_gathered: vectors that are gathered inside each silo at the end of a round.
        inter_silo: sent between the silos in a round, by all of them together.
    """

    gradients: int
    all_gathered: int
    inter_silo: int


@dataclass(frozen=True)
class LinkSpeed:
    """Speed of a link.

    Attributes:
        bandwidth: bytes per second that one end sends.
        latency: seconds of an all-reduce of one number over all ends.
        is_measured: False if the user gave the values.
    """

    bandwidth: float
    latency: float
    is_measured: bool

    def seconds(self, size: float, messages: int = 1) -> float:
        """Return the seconds in which one end sends `size` bytes, in a number of messages one after another."""
        return messages * self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Star:
    """Links of a federation: each site has one to the coordinator, all of whose traffic goes over its own.

    Attributes:
        sites: number of sites.
        brought: bytes that a site sends in a round.
        fetched: bytes that it gets.
        link: the coordinator's, with the latency of a meeting.
    """

    sites: int
    brought: int
    fetched: int
    link: LinkSpeed

    @property
    def seconds(self) -> float:
        """Seconds of a round in which sites send and get: first all send, then all get."""
        return self.link.seconds(self.sites * (self.brought + self.fetched))


@dataclass(frozen=True)
class CostModel:
    """Everything that the time of a round depends on.

    Attributes:
        loads: work of each silo.
        stage_times: times of a rank, by the number of replicas of its silo.
        traffic: sizes of the vectors that are exchanged.
        intra_silo: link between the replicas of a silo; None if no silo has two.
        inter_silo: link of a silo to the others; None if there is only one silo.
        rounds: number of rounds of the run.
        averaging: seconds per step of averaging the gradients, by number of replicas, where measured.
        overlap: steps of the next round during which communication between silos may still be under way.
        star: links of a federation, instead of those between silos; None without one.
    """

    loads: tuple[SiloLoad, ...]
    stage_times: dict[int, StageTimes]
    traffic: Traffic
    intra_silo: LinkSpeed | None
    inter_silo: LinkSpeed | None
    rounds: int
    averaging: dict[int, float] = field(default_factory=dict)
    overlap: int = 0
    star: Star | None = None

    @property
    def silo_sizes(self) -> tuple[int, ...]:
        return tuple(load.replicas for load in self.loads)

    @property
    def intra_silo_bytes(self) -> float:
        """Bytes that a rank sends inside its silo in a round, at most."""
        return max(
            load.steps * ring_bytes(self.traffic.gradients, load.replicas)
            + self.traffic.all_gathered * (load.replicas - 1) / load.replicas
            for load in self.loads
        )


@dataclass(frozen=True)
class Estimate:
    """Seconds of a round, in the silo that takes longest, which the others wait for.

    Attributes:
        computing: the steps, without communication.
        averaging: averaging gradients inside the silo.
        updating: loading and updating parameters: clients, aggregation, the server's step.
        sending: communication between silos, and then inside them, as far as it is waited for.
    """

    computing: float
    averaging: float
    updating: float
    sending: float

    @property
    def seconds(self) -> float:
        return self.computing + self.averaging + self.updating + self.sending


def estimate(costs: CostModel) -> Estimate:
    """Estimate the seconds of a round."""
    local, steps = max(((_local_training(costs, load), load.steps) for load in costs.loads), key=lambda x: x[0].seconds)
    aggregation = max(costs.stage_times[load.replicas].aggregation for load in costs.loads)
    hidden = min(costs.overlap, steps) * (local.computing + local.averaging) / max(steps, 1)
    link = costs.inter_silo or costs.intra_silo
    header = link.latency if link and not costs.star else 0.0  # to a coordinator it goes with the vectors
    sending = header + max(_inter_silo_seconds(costs) - hidden, 0.0) + _all_gather_seconds(costs)
    return replace(local, updating=local.updating + aggregation, sending=sending)


def _local_training(costs: CostModel, load: SiloLoad) -> Estimate:
    """Estimate the part of a round before aggregation, in one silo."""
    times, averaging = costs.stage_times[load.replicas], costs.averaging.get(load.replicas)
    if averaging is None:
        averaging = averaging_seconds(costs.traffic.gradients, load.replicas, costs.intra_silo)
    return Estimate(load.steps * times.step, load.steps * averaging, load.clients * times.client, 0.0)


def ring_bytes(size: int, members: int) -> float:
    """Return the bytes that each member sends in a ring all-reduce of `size` bytes.

    >>> ring_bytes(100, 4)
    150.0
    """
    return 2 * (members - 1) / members * size


def averaging_seconds(gradients: int, replicas: int, link: LinkSpeed | None) -> float:
    """Return the seconds of averaging gradients over a silo, bucket by bucket."""
    if replicas == 1:
        return 0.0
    assert link
    buckets = 1 + math.ceil(max(gradients - FIRST_BUCKET, 0) / BUCKET)
    return link.seconds(ring_bytes(gradients, replicas), buckets)


def _inter_silo_seconds(costs: CostModel) -> float:
    """Return the seconds in which silos exchange their vectors."""
    if costs.star:
        return costs.star.seconds
    if costs.inter_silo is None or not costs.traffic.inter_silo:
        return 0.0
    return costs.inter_silo.seconds(costs.traffic.inter_silo / len(costs.loads))


def _all_gather_seconds(costs: CostModel) -> float:
    """Return the seconds until all replicas of a silo have the whole sums."""
    most = max(costs.silo_sizes)
    if most == 1 or not costs.traffic.all_gathered:
        return 0.0
    assert costs.intra_silo
    # Replicas gather each other's shards; where silos differ in size, the leader broadcasts along a tree.
    share = (most - 1) / most if count_shards(costs.silo_sizes) > 1 else math.ceil(math.log2(most))
    return costs.intra_silo.seconds(
        share * costs.traffic.all_gathered, messages=2
    )  # of which the second sums the norm of the update


def slowest_stage_times(ranks: Iterable[Iterable[StageTimes]]) -> StageTimes:
    """Return the median over rounds of the slowest rank's times.

    Not the slowest of the medians: ranks that are slow in turn delay more rounds than any one of them.

    Args:
        ranks: times of each rank, round by round.
    """
    rounds = zip(*ranks, strict=False)
    slowest = [[max(stage) for stage in zip(*map(astuple, times), strict=True)] for times in rounds]
    return StageTimes(*map(median, zip(*slowest, strict=True)))
