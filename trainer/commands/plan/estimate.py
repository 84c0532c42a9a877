"""How long a round will take, and what part of it the ranks compute."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trainer.commands.plan.cost_model import CostModel, LinkSpeed, SiloLoad
from trainer.commands.plan.traffic import in_ring
from trainer.distributed.topology import count_shards

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes that DistributedDataParallel averages at once
LENGTHS = (0.1, 1.0, 10.0)  # of rounds, in those of the configuration


@dataclass(frozen=True)
class Estimate:
    """The seconds of a round of the silo that takes longest, which the others wait for.

    steps      of it
    computing  its steps, with nothing sent
    averaging  gradients, inside the silo
    passing    over memory: clients begun and ended, vectors packed, the silos' sums applied
    sending    the header, then the vectors between silos, and from replica to replica; what of it is waited for
    """

    steps: int
    computing: float
    averaging: float
    passing: float
    sending: float

    @property
    def seconds(self) -> float:
        return self.computing + self.averaging + self.passing + self.sending

    @property
    def utilisation(self) -> float:
        """The time of the steps without a wire, over the time with all."""
        return self.computing / self.seconds


def estimate(costs: CostModel, length: float = 1.0) -> Estimate:
    """A round of so many times the steps."""
    slowest = max((_of_silo(costs, load, length) for load in costs.loads), key=lambda silo: silo.seconds)
    combination = max(costs.stage_times[load.replicas].combination for load in costs.loads)
    under_way = min(costs.overlap, slowest.steps) * (slowest.computing + slowest.averaging) / max(slowest.steps, 1)
    slow = costs.inter_silo or costs.intra_silo
    header = slow.latency if slow else 0.0
    sending = header + max(seconds_between(costs) - under_way, 0.0) + _seconds_to_join(costs)
    packing = costs.compression_costs[costs.uplink].seconds if costs.uplink else 0.0
    return replace(slowest, passing=slowest.passing + combination + packing, sending=sending)


def _of_silo(costs: CostModel, load: SiloLoad, length: float) -> Estimate:
    """The part of a round until its combination."""
    pace = costs.stage_times[load.replicas]
    steps = max(round(load.steps * length), min(load.steps, load.clients))
    averaging = costs.averaging.get(load.replicas)
    if averaging is None:
        averaging = seconds_to_average(costs.traffic.gradients, load.replicas, costs.intra_silo)
    return Estimate(steps, steps * pace.step, steps * averaging, load.clients * pace.client, 0.0)


def seconds_to_average(gradients: int, replicas: int, inside: LinkSpeed | None) -> float:
    """Seconds of the mean over a silo of so many bytes of gradients, a ring all-reduce for each bucket of them."""
    if replicas == 1:
        return 0.0
    assert inside
    buckets = 1 + math.ceil(max(gradients - FIRST_BUCKET, 0) / BUCKET)
    return buckets * inside.latency + in_ring(gradients, replicas) / inside.bandwidth


def seconds_between(costs: CostModel) -> float:
    """Seconds of the vectors that silos send each other."""
    if costs.inter_silo is None or not costs.traffic.inter_silo:
        return 0.0
    return costs.inter_silo.latency + costs.traffic.inter_silo / len(costs.loads) / costs.inter_silo.bandwidth


def _seconds_to_join(costs: CostModel) -> float:
    """Seconds until all replicas of a silo have all of the sums: slices gathered, or the leader's copy passed on."""
    most = max(costs.silo_sizes)
    if most == 1 or not costs.traffic.all_gathered:
        return 0.0
    assert costs.intra_silo
    part = (most - 1) / most if count_shards(costs.silo_sizes) > 1 else math.ceil(math.log2(most))
    return (
        2 * costs.intra_silo.latency + part * costs.traffic.all_gathered / costs.intra_silo.bandwidth
    )  # and the norm is added up
