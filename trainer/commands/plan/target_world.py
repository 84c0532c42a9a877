"""The ranks of a run that is not there: how many, on which nodes, in which silos."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.commands.plan.options import PlanOptions
from trainer.config.schema import LaunchConfig
from trainer.distributed.launch.processes import choose_nproc
from trainer.distributed.topology import Topology

AT_ONCE = 2  # workers here, where none of them is timed: a link has two ends


def is_remote_run(options: PlanOptions, launch: LaunchConfig, by_launcher: bool = True) -> bool:
    """Whether the run is for other ranks than those that look around.

    With `launch.nodes` the command is typed on one node alone if the link between the silos is told. Workers that
    torchrun or srun started are those of the run.
    """
    return options.ranks is not None or (by_launcher and launch.nodes != 1 and options.bandwidth is not None)


def count_local_workers(options: PlanOptions, launch: LaunchConfig) -> int:
    """How many workers of this node look around: as many as would train here, so that they are in each other's way."""
    nproc = choose_nproc(launch.nproc_per_node, launch.device)
    nproc = min(nproc, options.ranks or nproc)
    return nproc if options.seconds_per_step is None else min(nproc, AT_ONCE)


def remote_nodes(options: PlanOptions, launch: LaunchConfig) -> list[int]:
    """The node of each rank of a run that is started elsewhere; of `launch.nodes=[least,most]`, with the most."""
    nproc = choose_nproc(launch.nproc_per_node, launch.device)
    most = launch.nodes if isinstance(launch.nodes, int) else launch.nodes[1]
    return [rank // nproc for rank in range(options.ranks or most * nproc)]


def check_links(options: PlanOptions, sizes: Sequence[int], is_remote: bool, workers: int) -> None:
    """Raises ValueError if a link that silos of these sizes need is neither told, nor one between so many workers."""
    if is_remote and len(sizes) > 1 and options.bandwidth is None:
        raise ValueError(
            f"plan.ranks={sum(sizes)} without plan.bandwidth: the links between those silos are not here.\n"
            "  set plan.bandwidth=1Gbit, or what it is; or leave plan.ranks out, to measure those that are here"
        )
    if max(sizes) > 1 and options.bandwidth_inside is None and workers == 1:
        raise ValueError(
            "plan.bandwidth_inside has no value, and one worker alone has no link to measure.\n"
            "  set plan.bandwidth_inside=10GB/s, or what it is; or launch.nproc_per_node=2"
        )


def leader_topology(silo: int, sizes: Sequence[int], device: torch.device) -> Topology:
    """The place of a silo's replica 0, in a world that is not there: its groups are this process alone."""
    return Topology(sum(sizes[:silo]), sum(sizes), silo, 0, tuple(sizes), device, None, None)
