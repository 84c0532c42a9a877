"""`python -m trainer plan`: starts workers that measure, and prints the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console

from trainer.commands.exit_codes import FINISHED
from trainer.commands.plan.console import show
from trainer.commands.plan.measure import Planner
from trainer.commands.plan.options import PREFIX, PlanOptions, parse_options
from trainer.commands.plan.target_world import check_links, count_local_workers, is_remote_run, remote_nodes
from trainer.commands.probe.workers import launch_workers, run_worker
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.distributed.environment import check_launcher, is_worker
from trainer.distributed.launch.processes import TRAINER
from trainer.distributed.peers import Peers
from trainer.distributed.silos import silo_sizes
from trainer.utils.errors import ErrorCollector
from trainer.utils.text import format_value

USAGE = """\
python -m trainer plan [key=value ...] [plan.key=value ...]     what a run with these overrides would cost
torchrun --nproc-per-node 4 -m trainer plan [key=value ...]     the same with workers that torchrun or srun starts

The workers of the run play rounds without training further, and measure their links. The plan lists the world, steps
and examples, the seconds of a round and the share of it in which ranks compute, bytes inside and between silos, and
the memory of a rank. docs/plan.md explains how they are estimated.

  plan.bandwidth=100Mbit          that a silo can send to the others: 1Gbit, 10GB/s, ...; default: measured
                                  of a federation: that its coordinator can send, and get, at once
  plan.latency=50ms               from one silo to another; default: measured, or 0 with plan.bandwidth
  plan.bandwidth_inside=300GB/s   that a rank can send inside its silo; default: measured
  plan.ranks=64                   of a run on other machines, launch.nproc_per_node on each; needs plan.bandwidth
  plan.seconds_per_step=0.12      of a rank of that run, without communication; default: measured here

Exit codes: 0 the plan is printed, 1 failed, 2 bad input."""


def main(arguments: Sequence[str]) -> int:
    """Run the launcher or one worker, and return its exit code.

    Raises ValueError for bad input that the launcher finds.
    """
    plan_arguments = [argument for argument in arguments if argument.startswith(PREFIX)]
    overrides = [argument for argument in arguments if not argument.startswith(PREFIX)]
    errors = ErrorCollector()
    options = errors.collect(lambda: parse_options(plan_arguments))
    if is_worker(overrides):
        errors.raise_any()
        return run_worker(overrides, partial(_plan, options))
    tree = errors.collect(lambda: compose_tree(overrides))
    errors.raise_any()
    errors.collect(lambda: _check_site(tree["site"], options))
    errors.raise_any()
    tree = _in_one_world(tree)
    config = read_config(tree)
    check_launcher(config.launch.nodes)
    launch = replace(config.launch, nproc_per_node=count_local_workers(options, config.launch))
    if is_remote_run(options, config.launch):
        sizes = silo_sizes(config.silos, remote_nodes(config.launch, options.ranks))
        check_links(options, sizes, True, int(launch.nproc_per_node))
        launch = replace(launch, nodes=1, rdzv_endpoint=None)
    return launch_workers(tree, launch, (*TRAINER, "plan", *plan_arguments))


def _check_site(site: dict[str, Any], options: PlanOptions) -> None:
    """Raise ValueError if this launch is part of a federation that cannot be planned here."""
    if site["listen"] is not None:
        members = format_value(site["members"])
        raise ValueError(
            f"site.listen={site['listen']}: a plan plays rounds, and the coordinator has no examples\n"
            f"  plan a site, which knows the members: python -m trainer plan ... site.name= site.members={members}"
        )
    if site["name"] is not None and options.bandwidth is None:
        raise ValueError(
            "plan.bandwidth is not set, and the link to the coordinator is not measured here\n"
            "  set that of the coordinator, as in plan.bandwidth=100Mbit; python -m trainer doctor measures it"
        )


def _in_one_world(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the sites of a simulation as silos of one world, since they share a machine."""
    sites, launch = tree["site"]["simulate"], tree["launch"]
    if sites is None or tree["silos"] == sites:
        return tree
    return {**tree, "silos": sites, "launch": {**launch, "nproc_per_node": sites * launch["nproc_per_node"]}}


def _plan(options: PlanOptions, tree: dict[str, Any], peers: Peers) -> int:
    """Measure, and print the plan on rank 0; the exit code."""
    _check_site(tree["site"], options)  # again: torchrun has started the workers
    plan = Planner(read_config(_in_one_world(tree)), options, peers).plan()
    if peers.rank == 0:
        show(plan, Console())
    return FINISHED
