"""Workers that look around instead of training: started as those of a run would be, but once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trainer.commands.probe.connectivity import connection_error
from trainer.commands.probe.host_facts import USER_OMP_VARIABLE
from trainer.commands.probe.network_interfaces import is_local_host
from trainer.commands.probe.watchdog import watchdog
from trainer.commands.train.launcher import BAD_INPUT, FAILED, FINISHED, PREEMPTED, RESOLVED, RESTART
from trainer.config.compose import compose_tree
from trainer.config.schema import LaunchConfig
from trainer.distributed.environment import ClusterEnvironment, check_ranks, detect_environment
from trainer.distributed.launch.processes import (
    WorkerFailure,
    choose_nproc,
    choose_threads,
    start_workers,
)
from trainer.distributed.launch.rendezvous import open_rendezvous
from trainer.distributed.launch.signals import handle_stop_signals
from trainer.distributed.launch.world import Interrupted, NodesUnreachableError
from trainer.distributed.topology import broadcast_via_store, open_store

CONNECT_TIMEOUT_SECONDS = 20  # to where the ranks meet
RENDEZVOUS_TIMEOUT_SECONDS = 60  # a cold file system takes long to give torch out

Tree = dict[str, Any]

# What a rank does with the resolved configuration, its place and the store; its exit code. Raises ValueError, on all
# ranks, for bad input.
WorkerFunction = Callable[[Tree, ClusterEnvironment, Any], int]


def launch_workers(tree: Tree, launch: LaunchConfig, arguments: Sequence[str]) -> int:
    """The exit code when the workers of this node have looked around; they are Python with these arguments."""
    if fault := _rendezvous_error(launch.nodes, launch.rdzv_endpoint):
        print(fault, file=sys.stderr)
        return FAILED
    nproc = choose_nproc(launch.nproc_per_node, launch.device)
    own = {RESTART: "0", USER_OMP_VARIABLE: os.environ.get("OMP_NUM_THREADS", "")}
    with handle_stop_signals() as stop:
        try:
            with open_rendezvous(launch.nodes, launch.rdzv_endpoint, lambda: stop.signal) as nodes:
                world = nodes.next_world(nproc, 0, lambda: stop.signal)
                environment = {RESOLVED: nodes.broadcast("config", lambda: json.dumps(tree)), **own}
                with start_workers(
                    world, choose_threads(launch.threads_per_worker, nproc), stop, environment, arguments
                ) as workers:
                    ended = workers.wait()
        except (NodesUnreachableError, Interrupted) as error:
            print(error or "told to stop before the other nodes have come", file=sys.stderr)
            return FAILED
    if stop.signal:
        return PREEMPTED
    return max(ended.code, FAILED) if isinstance(ended, WorkerFailure) else FINISHED


def run_worker(overrides: list[str], function: WorkerFunction) -> int:
    """What one rank does; rank 0's exit code is that of all."""
    place = detect_environment()
    where = f"{place.host}:{place.port}"
    if place.rank and place.host and (fault := connection_error(place.host, place.port, CONNECT_TIMEOUT_SECONDS)):
        said = f"rank {place.rank} cannot reach {where}, where the ranks meet: {fault}"
        print(f"{said}\n  open the port between the hosts, or give another address of that host", file=sys.stderr)
        return FAILED
    late = f"rank {place.rank}: not all of the {place.world_size} ranks have come to {where} in {RENDEZVOUS_TIMEOUT_SECONDS} s"
    with watchdog(RENDEZVOUS_TIMEOUT_SECONDS, late):
        store = open_store(place)
        told = json.loads(broadcast_via_store(store, "config", place, lambda: json.dumps(_composed(overrides, place))))
    code = _call(told, function, place, store)
    code = int(broadcast_via_store(store, "code", place, lambda: str(code)))
    _leave_last(place, store)
    return code


def _rendezvous_error(nodes: int | list[int], where: str | None) -> str:
    """Why this node would wait in vain for the others; empty if it would not, or is where they meet."""
    host, _, port = (where or "").rpartition(":")
    if nodes == 1 or not host or not port.isdigit() or is_local_host(host):
        return ""
    fault = connection_error(host, int(port), CONNECT_TIMEOUT_SECONDS)
    way_out = "start the command there first, and open the port between the hosts"
    return f"launch.rdzv_endpoint={where} cannot be reached from here: {fault}\n  {way_out}" if fault else ""


def _composed(overrides: list[str], environment: ClusterEnvironment) -> dict[str, Any]:
    try:
        tree = json.loads(os.environ[RESOLVED]) if RESOLVED in os.environ else compose_tree(overrides)
        check_ranks(environment, tree["launch"]["nproc_per_node"])
    except ValueError as error:
        return {"faults": str(error)}
    return {"tree": tree}


def _call(told: dict[str, Any], function: WorkerFunction, environment: ClusterEnvironment, store: Any) -> int:
    try:
        if "faults" in told:
            raise ValueError(told["faults"])
        return function(told["tree"], environment, store)
    except ValueError as error:
        if environment.rank == 0:
            print(error, file=sys.stderr)
        return BAD_INPUT


def _leave_last(environment: ClusterEnvironment, store: Any) -> None:
    """Rank 0, which may hold the store, leaves last."""
    store.set(f"left/{environment.rank}", "")
    if environment.rank == 0:
        for rank in range(environment.world_size):
            store.get(f"left/{rank}")
