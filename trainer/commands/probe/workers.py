"""Workers that measure instead of training: started once, like those of a run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trainer.commands.exit_codes import BAD_INPUT, FAILED, FINISHED, PREEMPTED
from trainer.commands.probe.host_facts import USER_OMP_VARIABLE
from trainer.commands.probe.watchdog import watchdog
from trainer.commands.train.launcher import RESOLVED, RESTART
from trainer.config.compose import compose_tree
from trainer.config.schema import LaunchConfig
from trainer.distributed.environment import ClusterEnvironment, check_ranks, detect_environment
from trainer.distributed.launch.processes import (
    WorkerFailure,
    choose_nproc,
    choose_threads,
    start_workers,
)
from trainer.distributed.launch.reachability import connection_error, is_local_host
from trainer.distributed.launch.rendezvous import open_rendezvous
from trainer.distributed.launch.signals import handle_stop_signals
from trainer.distributed.launch.world import Interrupted, NodesUnreachableError
from trainer.distributed.topology import broadcast_via_store, open_store

CONNECT_TIMEOUT_SECONDS = 20  # for the rendezvous to answer
RENDEZVOUS_TIMEOUT_SECONDS = 60  # for all ranks to come: torch takes long to load from a cold file system

Tree = dict[str, Any]

# The work of a rank, from the resolved configuration, its environment and the store to an exit code. Raises ValueError,
# on all ranks, for bad input.
WorkerFunction = Callable[[Tree, ClusterEnvironment, Any], int]


def launch_workers(tree: Tree, launch: LaunchConfig, arguments: Sequence[str]) -> int:
    """Start the workers of this node and wait for them; the exit code.

    Args:
        tree: the resolved configuration.
        launch: numbers of nodes and workers.
        arguments: of Python, which make a worker.
    """
    if error := _rendezvous_error(launch.nodes, launch.rdzv_endpoint):
        print(error, file=sys.stderr)
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
            print(error or "stopped before the other nodes had joined", file=sys.stderr)
            return FAILED
    if stop.signal:
        return PREEMPTED
    return max(ended.code, FAILED) if isinstance(ended, WorkerFailure) else FINISHED


def run_worker(overrides: list[str], function: WorkerFunction) -> int:
    """Run one worker; the exit code of rank 0, on all ranks."""
    environment = detect_environment()
    rank, host, port = environment.rank, environment.host, environment.port
    if rank and host and (error := connection_error(host, port, CONNECT_TIMEOUT_SECONDS)):
        print(
            f"rank {rank} cannot reach the rendezvous at {host}:{port}: {error}\n"
            "  open the port between the hosts, or set another address of that host",
            file=sys.stderr,
        )
        return FAILED
    late = (
        f"rank {rank}: not all of the {environment.world_size} ranks have joined the rendezvous at {host}:{port} "
        f"within {RENDEZVOUS_TIMEOUT_SECONDS} s"
    )
    with watchdog(RENDEZVOUS_TIMEOUT_SECONDS, late):
        store = open_store(environment)
        composed = broadcast_via_store(
            store, "config", environment, lambda: json.dumps(_compose(overrides, environment))
        )
    code = _call(json.loads(composed), function, environment, store)
    code = int(broadcast_via_store(store, "code", environment, lambda: str(code)))
    _exit_barrier(environment, store)
    return code


def _rendezvous_error(nodes: int | tuple[int, int], endpoint: str | None) -> str:
    """Return why this node cannot reach the rendezvous; empty if it can, or holds it."""
    host, _, port = (endpoint or "").rpartition(":")
    if nodes == 1 or not host or not port.isdigit() or is_local_host(host):
        return ""
    error = connection_error(host, int(port), CONNECT_TIMEOUT_SECONDS)
    remedy = "start the command on that host first, and open the port between the hosts"
    return f"launch.rdzv_endpoint={endpoint} cannot be reached from this host: {error}\n  {remedy}" if error else ""


def _compose(overrides: list[str], environment: ClusterEnvironment) -> dict[str, Any]:
    try:
        tree = json.loads(os.environ[RESOLVED]) if RESOLVED in os.environ else compose_tree(overrides)
        check_ranks(environment, tree["launch"]["nproc_per_node"])
    except ValueError as error:
        return {"error": str(error)}
    return {"tree": tree}


def _call(composed: dict[str, Any], function: WorkerFunction, environment: ClusterEnvironment, store: Any) -> int:
    try:
        if "error" in composed:
            raise ValueError(composed["error"])
        return function(composed["tree"], environment, store)
    except ValueError as error:
        if environment.rank == 0:
            print(error, file=sys.stderr)
        return BAD_INPUT


def _exit_barrier(environment: ClusterEnvironment, store: Any) -> None:
    """Let rank 0, which may hold the store, exit last."""
    store.set(f"left/{environment.rank}", "")
    if environment.rank == 0:
        for rank in range(environment.world_size):
            store.get(f"left/{rank}")
