"""`python -m trainer plan`: starts workers that try a round and the links, and says what the run will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console

from trainer.commands.plan.console import show
from trainer.commands.plan.measure import Planner
from trainer.commands.plan.options import PlanOptions, parse_options, split_arguments
from trainer.commands.plan.target_world import check_links, count_local_workers, is_remote_run, remote_nodes
from trainer.commands.probe.workers import launch_workers, run_worker
from trainer.commands.train.launcher import FINISHED
from trainer.config.compose import compose_tree
from trainer.config.instantiate import ErrorCollector
from trainer.config.schema import read_config
from trainer.distributed.environment import ClusterEnvironment, check_launcher, check_world, is_worker
from trainer.distributed.topology import silo_sizes

USAGE = """\
python -m trainer plan [key=value ...] [plan.key=value ...]     what a run with these overrides would cost
torchrun --nproc-per-node 4 -m trainer plan [key=value ...]     the same with workers that torchrun starts; or srun

The workers that a run would start play a round each, without training further, and measure their links. Then are told:
the mesh, steps and examples, bytes inside and between silos, memory of a rank, seconds of a round and the part of it
in which ranks compute, for several lengths of rounds, and what would help most. docs/plan.md says how it is reckoned.

  plan.bandwidth=100Mbit          what a silo can send to the others: 1Gbit, 10GB/s, ...; without it, it is measured
  plan.latency=50ms               from a silo to another one
  plan.bandwidth_inside=300GB/s   what a rank can send inside its silo; without it, it is measured
  plan.ranks=64                   of a run on other machines, launch.nproc_per_node a machine; needs plan.bandwidth
  plan.seconds_per_step=0.12      of a rank there, with nothing sent; without it, it is measured here

Exit codes: 0 told, 1 failed, 2 bad input."""

COMMAND = ("-m", "trainer", "plan")


def main(arguments: Sequence[str]) -> int:
    """The exit code of the launcher, or of one worker. Raises ValueError for bad input that the launcher finds."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return FINISHED
    own, overrides = split_arguments(arguments)
    errors = ErrorCollector()
    wishes = errors.collect(lambda: parse_options(own))
    if is_worker(overrides):
        check_world()
        errors.raise_any()
        return run_worker(overrides, partial(_plan, wishes))
    tree = errors.collect(lambda: compose_tree(overrides))
    errors.raise_any()
    config = read_config(tree)
    check_launcher(config.launch.nodes)
    here = replace(config.launch, nproc_per_node=count_local_workers(wishes, config.launch))
    if is_remote_run(wishes, config.launch):
        sizes = silo_sizes(config.silos, remote_nodes(wishes, config.launch))
        check_links(wishes, sizes, True, int(here.nproc_per_node))
        here = replace(here, nodes=1, rdzv_endpoint=None)
    return launch_workers(tree, here, (*COMMAND, *own))


def _plan(options: PlanOptions, tree: dict[str, Any], environment: ClusterEnvironment, store: Any) -> int:
    """The exit code, on rank 0 when it has printed the plan."""
    plan = Planner(read_config(tree), options, environment, store).plan()
    if environment.rank == 0:
        show(plan, Console())
    return FINISHED
