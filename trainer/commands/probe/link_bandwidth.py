"""How fast each kind of link is: latency of a small all-reduce, bandwidth of a large one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.topology import Topology

LARGE = 4 * 2**20  # floats: 16 MiB
SMALL_REPETITIONS, LARGE_REPETITIONS = 20, 3


@dataclass(frozen=True)
class Link:
    """One kind of link. groups: of ranks that were measured at once; the slowest and its first rank are what counts.

    latency: seconds of an all-reduce of one number. bandwidth: bytes a second over each rank's link, by a ring: the
    bytes that it sends in an all-reduce of n ranks are 2 (n - 1) / n times those of the vector.
    """

    name: str
    groups: int
    largest: int
    latency: float
    bandwidth: float
    slowest: int


def measure_links(silos: Topology, hosts: Topology) -> list[Link]:
    """Every kind of link that a run uses; `hosts` has a silo a host. A collective over the world."""
    kinds = [("inside silos", "between silos", silos)]
    if hosts.silo_sizes != silos.silo_sizes:
        kinds.append(("inside hosts", "between hosts", hosts))
    links = []
    for inside, between, topology in kinds:
        if max(topology.silo_sizes) > 1:
            links.append(_inside(inside, topology))
        if topology.num_silos > 1:
            links.append(_between(between, topology))
    return links


def _inside(name: str, topology: Topology) -> Link:
    seconds = _seconds(
        lambda values: collectives.all_reduce_mean_in_silo(values, topology), topology, topology.num_replicas > 1
    )
    return _link(name, seconds, topology.num_replicas, len(topology.silo_sizes))


def _between(name: str, topology: Topology) -> Link:
    seconds = _seconds(
        lambda values: collectives.all_reduce_between_leaders(values, topology), topology, topology.is_leader
    )
    return _link(name, seconds, topology.num_silos, 1)


def _seconds(reduce: Callable[[Tensor], Tensor], topology: Topology, takes_part: bool) -> tuple[float, float]:
    """Seconds of a small and of a large all-reduce on this rank; zeros if it takes no part."""
    measured = []
    for size, repetitions in ((1, SMALL_REPETITIONS), (LARGE, LARGE_REPETITIONS)):
        values = torch.zeros(size, device=topology.device)
        collectives.barrier()
        times = [_timed(reduce, values) for _ in range(repetitions + 1)] if takes_part else [0.0]
        measured.append(median(times[1:] or times))  # the first one makes the connections
    return measured[0], measured[1]


def _timed(reduce: Callable[[Tensor], Tensor], values: Tensor) -> float:
    began = time.perf_counter()
    reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _link(name: str, seconds: tuple[float, float], ranks: int, groups: int) -> Link:
    """The link on all ranks, from each rank's seconds in a group of so many ranks."""
    rows = collectives.all_gather_rows(torch.tensor([*seconds, ranks], dtype=torch.float64))
    sent = 4 * LARGE * 2 * (rows[:, 2] - 1) / rows[:, 2]
    took_part = rows[:, 1] > 0
    bandwidths = torch.where(took_part, sent / rows[:, 1], torch.inf)
    slowest = int(bandwidths.argmin())
    largest, latency = int(rows[took_part, 2].max()), rows[:, 0].max().item()
    return Link(name, groups, largest, latency, bandwidths[slowest].item(), slowest)
