"""Launcher: starts the workers of this node, restarts them after a failure, and returns the exit code of the run.

The workers write the status of the run to state.json. The launcher adds what they cannot: that one of them was killed,
or that they were preempted before they had begun.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from trainer.checkpoint.files import private_files
from trainer.checkpoint.run_dir import RunDir
from trainer.commands.exit_codes import CODES, DISK_FAILURE, FAILED, PREEMPTED
from trainer.config.schema import read_config
from trainer.config.targets import check_targets
from trainer.distributed.launch.processes import (
    TRAINER,
    MembershipChanged,
    WorkerFailure,
    choose_nproc,
    choose_threads,
    start_workers,
)
from trainer.distributed.launch.rendezvous import open_rendezvous
from trainer.distributed.launch.signals import STOP_SIGNALS, SignalHandler, handle_stop_signals
from trainer.distributed.launch.world import Interrupted, NodesUnreachableError, Rendezvous, World
from trainer.distributed.parallel_dims import parallel_dims
from trainer.distributed.silos import silo_sizes
from trainer.utils.disk import DiskError
from trainer.utils.output import copied_output

# Environment variables of the workers: the resolved configuration as JSON, and the number of restarts so far.
RESOLVED, RESTART = "SILOTRAIN_CONFIG", "SILOTRAIN_RESTART"

RESTART_NOTICE_SECONDS = 3  # for another node to announce a restart

RunState = dict[str, Any]  # the content of state.json

REFUSED: RunState = {"status": "bad_input"}  # found and printed by the workers before the folder was theirs


def resolved_tree(compose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the configuration that a launcher has resolved for this worker; without one, what `compose` makes."""
    return json.loads(os.environ[RESOLVED]) if RESOLVED in os.environ else compose()


def own_texts(overrides: list[str]) -> list[str]:
    """Return the overrides of this worker, and the configuration that a launcher has given it."""
    return [*overrides, os.environ.get(RESOLVED, "")]


def launch(tree: dict[str, Any], arguments: Sequence[str] = TRAINER) -> int:
    """Run a resolved configuration in workers on this node.

    Args:
        tree: the resolved configuration.
        arguments: those of Python for a worker.

    Returns:
        The exit code of the run, when its workers have ended.

    Raises:
        ValueError: the run does not fit its folder or this machine; no worker was started.
    """
    config = read_config(tree)
    settings, private = config.launch, private_files() if config.site.is_federated else nullcontext()
    with private, handle_stop_signals() as stop:
        try:
            where = (settings.nodes, settings.rdzv_endpoint, settings.token_file)
            with open_rendezvous(*where, lambda world: _validated(tree, world), lambda: stop.signal) as nodes:
                launcher = _Launcher(tree, nodes, stop, arguments)
                with copied_output(launcher.folder.console):
                    return launcher.run()
        except Interrupted:
            print("stopped before the other nodes had joined", file=sys.stderr, flush=True)
            return PREEMPTED
        except DiskError as error:
            print(error.strerror, file=sys.stderr, flush=True)
            return FAILED
        except NodesUnreachableError as error:
            print(error, file=sys.stderr, flush=True)
            return FAILED


class _Launcher:
    """The launcher of one node. The node of `launch.rdzv_endpoint` decides the configuration of all."""

    def __init__(self, tree: dict[str, Any], rendezvous: Rendezvous, signals: SignalHandler, arguments: Sequence[str]):
        launch = read_config(tree).launch
        self.rendezvous, self.signals, self.arguments = rendezvous, signals, arguments
        self.nproc = choose_nproc(launch.nproc_per_node, launch.device)
        self.threads, self.restarts = choose_threads(launch.threads_per_worker, self.nproc), launch.max_restarts
        self.world = rendezvous.next_world(self.nproc, 0, lambda: signals.signal)
        agreed = json.loads(rendezvous.agreed)
        if "errors" in agreed:
            raise ValueError(agreed["errors"])
        self.tree = agreed["config"]
        check_targets(self.tree, [json.dumps(tree)])
        self.rounds, self.folder = self.tree["rounds"], RunDir(Path(self.tree["run_dir"]))

    def run(self) -> int:
        """Start the workers until the run has ended, or no restarts are left; return the exit code."""
        starts = failures = 0
        while True:
            state, ended = self._start()
            is_final = bool(state.get("final")) or (isinstance(ended, WorkerFailure) and ended.code == DISK_FAILURE)
            if state["status"] != "crashed" or is_final or self.signals.signal or failures == self.restarts:
                _report_status(self.folder, state, ended)
                return CODES[state["status"]]
            starts += 1
            failures += isinstance(ended, WorkerFailure)
            again = f"restart {failures} of {self.restarts}" if isinstance(ended, WorkerFailure) else "restarted"
            print(f"{ended}; {again}", file=sys.stderr, flush=True)
            self.world = self.rendezvous.next_world(self.nproc, starts, lambda: self.signals.signal)

    def _start(self) -> tuple[RunState, WorkerFailure | MembershipChanged | None]:
        """Start the workers once; return the state of the run when they have ended, and why they ended early."""
        version = self.folder.state_version()
        environment = {RESOLVED: json.dumps(self.tree), RESTART: str(self.world.restart)}
        changed = self.rendezvous.membership_changed
        start = (self.world, self.rendezvous.token, self.threads, self.signals, environment, self.arguments, changed)
        with start_workers(*start) as workers:
            ended = workers.wait()
            state = self._state_since(version)  # before the other workers, which are terminated now, write theirs
            if ended:
                self.rendezvous.announce_restart()
        if (
            state.get("status") == "preempted"
            and not self.signals.signal
            and self.rendezvous.membership_changed(RESTART_NOTICE_SECONDS)
        ):
            state, ended = {}, MembershipChanged()  # preempted by the workers of a node that restarts
        if ended is None and state.get("status") == "running" and not self.folder.is_in_use():
            ended = WorkerFailure(self.world.first_rank, 0)  # all of them have left in mid-run
        resolved = _resolve_status(state, ended, self.signals)
        if self.folder.path.exists() and resolved not in (REFUSED, self.folder.state()):
            with suppress(DiskError):  # which a worker has reported, or the next one will
                self.folder.set_status(**resolved)
        return resolved, ended

    def _state_since(self, version: tuple[int, int]) -> RunState:
        """Return the state that the workers of this start have written, or that of a run that had finished."""
        if self.folder.state_version() == version and not self.folder.has_finished(self.rounds):
            return {}
        return self.folder.state()


def _validated(tree: dict[str, Any], world: World) -> str:
    """Return the configuration that all nodes run, or the errors in it, as JSON."""
    config, folder = read_config(tree), RunDir(Path(tree["run_dir"]))
    try:
        folder.check(tree)
        folder.check_not_in_use()
        sizes = silo_sizes(config.silos, world.nodes, folder.num_clients())
        parallel_dims(sizes, world.nodes, config.silo.shard, config.silo.tensor)
    except ValueError as error:
        return json.dumps({"errors": str(error)})
    return json.dumps({"config": tree})


def _resolve_status(
    state: RunState, ended: WorkerFailure | MembershipChanged | None, signals: SignalHandler
) -> RunState:
    """Return the state of the run after its workers wrote `state` and ended like this."""
    if state.get("status") in ("finished", "bad_input", "preempted"):
        return state
    if signals.signal and (ended is None or (isinstance(ended, WorkerFailure) and -ended.code in STOP_SIGNALS)):
        return {"status": "preempted"}  # before the workers could take the signal
    if ended is None:
        return REFUSED
    has_left = isinstance(ended, WorkerFailure) and ended.code == 0  # the others could only report that it is gone
    if state.get("status") == "crashed" and not has_left:
        return state
    rank = {"rank": ended.rank} if isinstance(ended, WorkerFailure) else {}
    return {"status": "crashed", "error": str(ended), **rank}


def _report_status(folder: RunDir, state: RunState, ended: WorkerFailure | MembershipChanged | None) -> None:
    """Print why the run is not finished, unless the workers have."""
    if state["status"] == "preempted":
        reason = "preempted"
    elif ended and state.get("error") in (None, str(ended)):
        reason = str(ended)
    else:
        return
    print(f"{reason}; continue with run_dir={folder.path}", file=sys.stderr, flush=True)
