"""Latency and bandwidth of all-reduces over each kind of link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.utils.timing import synchronized_time

LARGE = 4 * 2**20  # floats, 16 MiB
SMALL_REPETITIONS, LARGE_REPETITIONS = 20, 3


@dataclass(frozen=True)
class Link:
    """A kind of link.

    Attributes:
        name: of the kind.
        groups: number of groups of ranks that were measured at once, of which the slowest counts.
        largest: number of ranks of the largest group.
        latency: seconds of an all-reduce of one number.
        bandwidth: bytes per second that a rank sends. In a ring all-reduce of n ranks, each sends 2 (n - 1) / n times
            the bytes of the vector.
        slowest: first rank of the slowest group.
    """

    name: str
    groups: int
    largest: int
    latency: float
    bandwidth: float
    slowest: int


def measure_links(silos: Topology, hosts: Topology) -> list[Link]:
    """Measure all kinds of links that a run uses. All ranks must call it.

    Args:
        silos: the run's topology.
        hosts: a topology with a silo for each host.
    """
    kinds = [("inside silos", "between silos", silos)]
    if hosts.silo_sizes != silos.silo_sizes:
        kinds.append(("inside hosts", "between hosts", hosts))
    links = []
    for inside, between, topology in kinds:
        if max(topology.silo_sizes) > 1:
            links.append(_measure_inside(inside, topology))
        if topology.num_silos > 1:
            links.append(_measure_between(between, topology))
    return links


def _measure_inside(name: str, topology: Topology) -> Link:
    seconds = _measure(
        lambda values: collectives.all_reduce_mean_in_silo(values, topology), topology, topology.num_replicas > 1
    )
    return _gather_link(name, seconds, topology.num_replicas, len(topology.silo_sizes))


def _measure_between(name: str, topology: Topology) -> Link:
    seconds = _measure(
        lambda values: collectives.all_reduce_between_leaders(values, topology), topology, topology.is_leader
    )
    return _gather_link(name, seconds, topology.num_silos, 1)


def _measure(reduce: Callable[[Tensor], Tensor], topology: Topology, takes_part: bool) -> tuple[float, float]:
    """Return this rank's seconds of a small and of a large all-reduce.

    They are zero if it does not take part.
    """
    measured = []
    for size, repetitions in ((1, SMALL_REPETITIONS), (LARGE, LARGE_REPETITIONS)):
        values = torch.zeros(size, device=topology.device)
        collectives.barrier()
        times = [_seconds(reduce, values) for _ in range(repetitions + 1)] if takes_part else [0.0]
        measured.append(median(times[1:] or times))  # the first one opens the connections
    return measured[0], measured[1]


def _seconds(reduce: Callable[[Tensor], Tensor], values: Tensor) -> float:
    began = synchronized_time(values.device)
    reduce(values)
    return synchronized_time(values.device) - began


def _gather_link(name: str, seconds: tuple[float, float], ranks: int, groups: int) -> Link:
    """Return the link on all ranks, from each rank's seconds and size of group."""
    rows = collectives.all_gather_rows(torch.tensor([*seconds, ranks], dtype=torch.float64))
    sent = 4 * LARGE * 2 * (rows[:, 2] - 1) / rows[:, 2]
    took_part = rows[:, 1] > 0
    bandwidths = torch.where(took_part, sent / rows[:, 1], torch.inf)
    slowest = int(bandwidths.argmin())
    largest, latency = int(rows[took_part, 2].max()), rows[:, 0].max().item()
    return Link(name, groups, largest, latency, bandwidths[slowest].item(), slowest)
