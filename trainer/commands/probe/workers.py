"""Workers that look around instead of training: started as those of a run would be, but once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trainer.commands.probe.connectivity import can_connect
from trainer.commands.probe.host_facts import OMP_OF_USER
from trainer.commands.probe.network_interfaces import is_here
from trainer.commands.probe.watchdog import deadline
from trainer.commands.train.launcher import BAD_INPUT, FAILED, FINISHED, PREEMPTED, RESOLVED, RESTART
from trainer.config.compose import compose_tree
from trainer.config.schema import LaunchConfig
from trainer.distributed.environment import Place, check_ranks, discover
from trainer.distributed.launch.processes import Failure, choose_nproc, choose_threads, heed_signals, started
from trainer.distributed.launch.rendezvous import meeting
from trainer.distributed.launch.world import Apart, Interrupted
from trainer.distributed.topology import meet, share

SECONDS_TO_CONNECT = 20  # to where the ranks meet
SECONDS_TO_MEET = 60  # a cold file system takes long to give torch out

Tree = dict[str, Any]

# What a rank does with the resolved configuration, its place and the store; its exit code. Raises ValueError, on all
# ranks, for bad input.
Look = Callable[[Tree, Place, Any], int]


def send(tree: Tree, launch: LaunchConfig, arguments: Sequence[str]) -> int:
    """The exit code when the workers of this node have looked around; they are Python with these arguments."""
    if fault := _fault_of_meeting(launch.nodes, launch.rdzv_endpoint):
        print(fault, file=sys.stderr)
        return FAILED
    nproc = choose_nproc(launch.nproc_per_node, launch.device)
    own = {RESTART: "0", OMP_OF_USER: os.environ.get("OMP_NUM_THREADS", "")}
    with heed_signals() as stop:
        try:
            with meeting(launch.nodes, launch.rdzv_endpoint, lambda: stop.signal) as nodes:
                world = nodes.gather(nproc, 0, lambda: stop.signal)
                environment = {RESOLVED: nodes.share("config", lambda: json.dumps(tree)), **own}
                with started(
                    world, choose_threads(launch.threads_per_worker, nproc), stop, environment, arguments
                ) as workers:
                    ended = workers.wait()
        except (Apart, Interrupted) as error:
            print(error or "told to stop before the other nodes have come", file=sys.stderr)
            return FAILED
    if stop.signal:
        return PREEMPTED
    return max(ended.code, FAILED) if isinstance(ended, Failure) else FINISHED


def work(overrides: list[str], look: Look) -> int:
    """What one rank does; rank 0's exit code is that of all."""
    place = discover()
    where = f"{place.host}:{place.port}"
    if place.rank and place.host and (fault := can_connect(place.host, place.port, SECONDS_TO_CONNECT)):
        said = f"rank {place.rank} cannot reach {where}, where the ranks meet: {fault}"
        print(f"{said}\n  open the port between the hosts, or give another address of that host", file=sys.stderr)
        return FAILED
    late = f"rank {place.rank}: not all of the {place.world_size} ranks have come to {where} in {SECONDS_TO_MEET} s"
    with deadline(SECONDS_TO_MEET, late):
        store = meet(place)
        told = json.loads(share(store, "config", place, lambda: json.dumps(_composed(overrides, place))))
    code = _answered(told, look, place, store)
    code = int(share(store, "code", place, lambda: str(code)))
    _part(place, store)
    return code


def _fault_of_meeting(nodes: int | list[int], where: str | None) -> str:
    """Why this node would wait in vain for the others; empty if it would not, or is where they meet."""
    host, _, port = (where or "").rpartition(":")
    if nodes == 1 or not host or not port.isdigit() or is_here(host):
        return ""
    fault = can_connect(host, int(port), SECONDS_TO_CONNECT)
    way_out = "start the command there first, and open the port between the hosts"
    return f"launch.rdzv_endpoint={where} cannot be reached from here: {fault}\n  {way_out}" if fault else ""


def _composed(overrides: list[str], place: Place) -> dict[str, Any]:
    try:
        tree = json.loads(os.environ[RESOLVED]) if RESOLVED in os.environ else compose_tree(overrides)
        check_ranks(place, tree["launch"]["nproc_per_node"])
    except ValueError as error:
        return {"faults": str(error)}
    return {"tree": tree}


def _answered(told: dict[str, Any], look: Look, place: Place, store: Any) -> int:
    try:
        if "faults" in told:
            raise ValueError(told["faults"])
        return look(told["tree"], place, store)
    except ValueError as error:
        if place.rank == 0:
            print(error, file=sys.stderr)
        return BAD_INPUT


def _part(place: Place, store: Any) -> None:
    """Rank 0, which may hold the store, leaves last."""
    store.set(f"left/{place.rank}", "")
    if place.rank == 0:
        for rank in range(place.world_size):
            store.get(f"left/{rank}")
