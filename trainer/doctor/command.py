"""`python -m trainer doctor`: starts the workers that a run would start, and lets them look around instead."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from trainer.compose import compose_tree
from trainer.config import Config, read_config
from trainer.doctor.deadline import deadline
from trainer.doctor.echo import can_connect
from trainer.doctor.exam import examine
from trainer.doctor.facts import OMP_OF_USER
from trainer.doctor.findings import findings
from trainer.doctor.interfaces import is_here
from trainer.doctor.screen import show
from trainer.launch.meeting import meeting
from trainer.launch.processes import Failure, choose_nproc, choose_threads, heed_signals, started
from trainer.launch.world import Apart, Interrupted
from trainer.launcher import BAD_INPUT, FAILED, FINISHED, PREEMPTED, RESOLVED, RESTART
from trainer.place import Place, check_launcher, check_ranks, check_world, discover, is_worker
from trainer.topology import meet, share

SECONDS_TO_CONNECT = 20  # to where the ranks meet
SECONDS_TO_MEET = 60  # a cold file system takes long to give torch out

USAGE = """\
python -m trainer doctor [key=value ...]                        looks at what a run with these overrides would use
torchrun --nproc-per-node 4 -m trainer doctor [key=value ...]   the same with workers that torchrun starts; or srun

Every rank says what it finds: host, interface, versions, clock, threads and cores, memory, disk, GPU. Then the links
are measured, and what would go wrong is said with the way out. docs/doctor.md has the list.

Exit codes: 0 nothing would go wrong, 1 something would, 2 bad input."""


def main(arguments: Sequence[str]) -> int:
    """The exit code of the launcher, or of one worker. Raises ValueError for bad input that the launcher finds."""
    arguments = list(arguments)
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return FINISHED
    if is_worker(arguments):
        check_world()
        return _work(arguments)
    tree = compose_tree(arguments)
    check_launcher(tree["launch"]["nodes"])
    return _launch(tree)


def _launch(tree: dict[str, Any]) -> int:
    """The exit code when the workers of this node have looked around."""
    launch = read_config(tree).launch
    if fault := _fault_of_meeting(launch.nodes, launch.meet):
        print(fault, file=sys.stderr)
        return FAILED
    nproc = choose_nproc(launch.nproc, launch.device)
    own = {RESTART: "0", OMP_OF_USER: os.environ.get("OMP_NUM_THREADS", "")}
    with heed_signals() as stop:
        try:
            with meeting(launch.nodes, launch.meet, lambda: stop.signal) as nodes:
                world = nodes.gather(nproc, 0, lambda: stop.signal)
                environment = {RESOLVED: nodes.share("config", lambda: json.dumps(tree)), **own}
                threads = choose_threads(launch.threads, nproc)
                with started(world, threads, stop, environment, ("-m", "trainer", "doctor")) as workers:
                    ended = workers.wait()
        except (Apart, Interrupted) as error:
            print(error or "told to stop before the other nodes have come", file=sys.stderr)
            return FAILED
    if stop.signal:
        return PREEMPTED
    return max(ended.code, FAILED) if isinstance(ended, Failure) else FINISHED


def _fault_of_meeting(nodes: int | list[int], where: str | None) -> str:
    """Why this node would wait in vain for the others; empty if it would not, or is where they meet."""
    host, _, port = (where or "").rpartition(":")
    if nodes == 1 or not host or not port.isdigit() or is_here(host):
        return ""
    fault = can_connect(host, int(port), SECONDS_TO_CONNECT)
    way_out = "start the command there first, and open the port between the hosts"
    return f"launch.meet={where} cannot be reached from here: {fault}\n  {way_out}" if fault else ""


def _work(overrides: list[str]) -> int:
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
    code = _examined(told, place, store)
    code = int(share(store, "code", place, lambda: str(code)))
    _part(place, store)
    return code


def _composed(overrides: list[str], place: Place) -> dict[str, Any]:
    try:
        tree = json.loads(os.environ[RESOLVED]) if RESOLVED in os.environ else compose_tree(overrides)
        check_ranks(place, tree["launch"]["nproc"])
    except ValueError as error:
        return {"faults": str(error)}
    return {"tree": tree}


def _examined(told: dict[str, Any], place: Place, store: Any) -> int:
    """The exit code, on rank 0 when it has printed what was found."""
    try:
        if "faults" in told:
            raise ValueError(told["faults"])
        config: Config = read_config(told["tree"])
        exam = examine(config, place, store)
    except ValueError as error:
        if place.rank == 0:
            print(error, file=sys.stderr)
        return BAD_INPUT
    if place.rank:
        return FINISHED
    found = findings(exam, config, told["tree"])
    show(exam, found, Console())
    return FAILED if any(finding.is_wrong for finding in found) else FINISHED


def _part(place: Place, store: Any) -> None:
    """Rank 0, which may hold the store, leaves last."""
    store.set(f"left/{place.rank}", "")
    if place.rank == 0:
        for rank in range(place.world_size):
            store.get(f"left/{rank}")
