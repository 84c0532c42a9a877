"""Workers that measure or evaluate instead of training: started once, like those of a run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trainer.commands.exit_codes import BAD_INPUT, FAILED, FINISHED, PREEMPTED
from trainer.commands.probe.host_facts import USER_OMP_VARIABLE
from trainer.commands.probe.watchdog import watchdog
from trainer.commands.train.launcher import RESOLVED, RESTART, own_texts, resolved_tree
from trainer.config.compose import compose_tree
from trainer.config.schema import LaunchConfig
from trainer.config.targets import check_targets
from trainer.distributed.environment import ClusterEnvironment, check_ranks, check_world, detect_environment
from trainer.distributed.launch.processes import (
    WorkerFailure,
    choose_nproc,
    choose_threads,
    start_workers,
)
from trainer.distributed.launch.reachability import connection_error, is_local_host, parse_endpoint
from trainer.distributed.launch.rendezvous import open_rendezvous
from trainer.distributed.launch.signals import handle_stop_signals
from trainer.distributed.launch.world import Interrupted, NodesUnreachableError
from trainer.distributed.peers import Peers
from trainer.distributed.store import open_store
from trainer.distributed.token import find_token, token_file

CONNECT_TIMEOUT_SECONDS = 20  # for the rendezvous to answer
RENDEZVOUS_TIMEOUT_SECONDS = 60  # for all ranks to come: torch takes long to load from a cold file system

Tree = dict[str, Any]


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
    threads = choose_threads(launch.threads_per_worker, nproc)
    environment = {RESTART: "0", USER_OMP_VARIABLE: os.environ.get("OMP_NUM_THREADS", "")}
    with handle_stop_signals() as stop:
        try:
            where = (launch.nodes, launch.rdzv_endpoint, launch.token_file)
            with open_rendezvous(*where, lambda world: json.dumps(tree), lambda: stop.signal) as nodes:
                world = nodes.next_world(nproc, 0, lambda: stop.signal)
                environment[RESOLVED] = nodes.agreed
                with start_workers(world, nodes.token, threads, stop, environment, arguments) as workers:
                    ended = workers.wait()
        except (NodesUnreachableError, Interrupted) as error:
            print(error or "stopped before the other nodes had joined", file=sys.stderr)
            return FAILED
    if stop.signal:
        return PREEMPTED
    return max(ended.code, FAILED) if isinstance(ended, WorkerFailure) else FINISHED


def run_worker(overrides: list[str], function: Callable[[Tree, Peers], int]) -> int:
    """Run one worker; the exit code of rank 0, on all ranks.

    Args:
        overrides: of the run.
        function: the work of a rank, from the resolved configuration to an exit code. For bad input it raises
            ValueError on all ranks.
    """
    check_world()
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
        peers = Peers(environment, open_store(environment, find_token(token_file(overrides))))
    try:
        tree = peers.broadcast("config", lambda: _checked_tree(overrides, environment))
        peers.on_all_ranks("targets", lambda: check_targets(tree, own_texts(overrides)))
        code = function(tree, peers)
    except ValueError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        code = BAD_INPUT
    code = peers.broadcast("code", lambda: code)
    peers.leave()
    return code


def _checked_tree(overrides: list[str], environment: ClusterEnvironment) -> Tree:
    tree = resolved_tree(lambda: compose_tree(overrides))
    check_ranks(environment, tree["launch"]["nproc_per_node"])
    return tree


def _rendezvous_error(nodes: int | tuple[int, int], endpoint: str | None) -> str:
    """Return why this node cannot reach the rendezvous; empty if it can, or holds it."""
    if nodes == 1:
        return ""
    host, port = parse_endpoint(endpoint)
    error = "" if is_local_host(host) else connection_error(host, port, CONNECT_TIMEOUT_SECONDS)
    remedy = "start the command on that host first, and open the port between the hosts"
    return f"launch.rdzv_endpoint={endpoint} cannot be reached from this host: {error}\n  {remedy}" if error else ""
