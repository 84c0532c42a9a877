"""Latency and bandwidth of all-reduces over each kind of link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.utils.timing import median_seconds

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
    kinds = {"silos": silos} if hosts.silo_sizes == silos.silo_sizes else {"silos": silos, "hosts": hosts}
    links = []
    for kind, topology in kinds.items():
        sizes, replicas = topology.silo_sizes, topology.num_replicas
        if max(sizes) > 1:
            took = _measure(collectives.all_reduce_mean_in_silo, topology, replicas > 1)
            links.append(_gather_link(f"inside {kind}", took, replicas, len(sizes)))
        if len(sizes) > 1:
            took = _measure(collectives.all_reduce_between_first_copies, topology, topology.is_leader)
            links.append(_gather_link(f"between {kind}", took, len(sizes), 1))
    return links


def _measure(reduce: Callable[[Tensor, Topology], Tensor], topology: Topology, takes_part: bool) -> tuple[float, float]:
    """Return this rank's seconds of a small and of a large all-reduce; zero if it does not take part."""
    seconds = []
    for size, repetitions in ((1, SMALL_REPETITIONS), (LARGE, LARGE_REPETITIONS)):
        values = torch.zeros(size, device=topology.device)
        collectives.barrier()
        timed = partial(reduce, values, topology)
        seconds.append(median_seconds(timed, topology.device, repetitions) if takes_part else 0.0)
    return seconds[0], seconds[1]


def _gather_link(name: str, seconds: tuple[float, float], ranks: int, groups: int) -> Link:
    """Return the link on all ranks, from each rank's seconds and size of group."""
    rows = collectives.all_gather_rows(torch.tensor([*seconds, ranks], dtype=torch.float64))
    sent = 4 * LARGE * 2 * (rows[:, 2] - 1) / rows[:, 2]
    took_part = rows[:, 1] > 0
    bandwidths = torch.where(took_part, sent / rows[:, 1], torch.inf)
    slowest = int(bandwidths.argmin())
    largest, latency = int(rows[took_part, 2].max()), rows[:, 0].max().item()
    return Link(name, groups, largest, latency, bandwidths[slowest].item(), slowest)
