"""Ranks of the target world: their number, nodes and silos."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.commands.plan.options import PlanOptions
from trainer.config.schema import LaunchConfig
from trainer.distributed.launch.processes import choose_nproc
from trainer.distributed.topology import Topology

MAX_UNTIMED_WORKERS = 2  # where steps are not timed, workers are needed for the two ends of a link only


def is_remote_run(options: PlanOptions, launch: LaunchConfig, by_launcher: bool = True) -> bool:
    """Return whether the run is planned for other ranks than those that measure.

    With `launch.nodes` the command runs on one node alone if the bandwidth between the silos is given. Workers of
    torchrun or srun are always those of the run.
    """
    return options.ranks is not None or (by_launcher and launch.nodes != 1 and options.bandwidth is not None)


def count_local_workers(options: PlanOptions, launch: LaunchConfig) -> int:
    """Return how many workers measure here.

    They are as many as would train on a node, because they share its resources.
    """
    nproc = choose_nproc(launch.nproc_per_node, launch.device)
    nproc = min(nproc, options.ranks or nproc)
    return nproc if options.seconds_per_step is None else min(nproc, MAX_UNTIMED_WORKERS)


def remote_nodes(launch: LaunchConfig, ranks: int | None = None) -> list[int]:
    """Return the node of each rank of a remote run.

    For `launch.nodes=[min,max]` the number of nodes is the largest.

    Args:
        launch: numbers of nodes and workers.
        ranks: number of ranks; None for those of all nodes.
    """
    nproc = choose_nproc(launch.nproc_per_node, launch.device)
    nodes = launch.nodes if isinstance(launch.nodes, int) else launch.nodes[1]
    return [rank // nproc for rank in range(ranks or nodes * nproc)]


def check_links(options: PlanOptions, sizes: Sequence[int], is_remote: bool, workers: int) -> None:
    """Check that each link that is needed is given, or can be measured here.

    Args:
        options: of the plan.
        sizes: numbers of replicas of the silos.
        is_remote: whether the links between the silos are elsewhere.
        workers: number of workers that measure.

    Raises:
        ValueError: a link is neither given nor here.
    """
    if is_remote and len(sizes) > 1 and options.bandwidth is None:
        raise ValueError(
            f"plan.ranks={sum(sizes)} without plan.bandwidth: the links between those silos cannot be measured here.\n"
            "  set their bandwidth, as in plan.bandwidth=1Gbit; or leave out plan.ranks, to measure the links here"
        )
    if max(sizes) > 1 and options.bandwidth_inside is None and workers == 1:
        raise ValueError(
            "plan.bandwidth_inside is not set, and a single worker has no link to measure.\n"
            "  set the bandwidth, as in plan.bandwidth_inside=10GB/s; or launch.nproc_per_node=2"
        )


def leader_topology(silo: int, sizes: Sequence[int], device: torch.device) -> Topology:
    """Return the topology of a silo's replica 0 in a world without process groups.

    Args:
        silo: its silo.
        sizes: numbers of replicas of all silos.
        device: of the replica.
    """
    return Topology(sum(sizes[:silo]), sum(sizes), silo, 0, tuple(sizes), device, None, None)
