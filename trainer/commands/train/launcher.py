"""Starts the workers of this node, and again after a failure; an exit code says what became of the run.

What the workers know of it they write to state.json. The launcher adds what they could not: that one was killed, or
that they were told to stop before they had begun.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_dir import RunDir
from trainer.config.schema import read_config
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
from trainer.distributed.topology import silo_sizes

FINISHED, FAILED, BAD_INPUT, PREEMPTED = os.EX_OK, 1, 2, os.EX_TEMPFAIL
CODES = {"finished": FINISHED, "crashed": FAILED, "bad_input": BAD_INPUT, "preempted": PREEMPTED}

# What workers learn from the launcher: the resolved configuration, and how often they were started again.
RESOLVED, RESTART = "SILOTRAIN_CONFIG", "SILOTRAIN_RESTART"

RESTART_NOTICE_SECONDS = 3  # what another node announces

RunState = dict[str, Any]  # what state.json holds


def launch(tree: dict[str, Any], arguments: Sequence[str] = TRAINER) -> int:
    """The exit code of the run that a resolved configuration describes, when its workers have ended.

    Raises ValueError, before there are any, if the run does not fit its folder or this machine.
    """
    settings = read_config(tree).launch
    with handle_stop_signals() as stop:
        try:
            with open_rendezvous(settings.nodes, settings.rdzv_endpoint, lambda: stop.signal) as nodes:
                return _Launcher(tree, nodes, stop, arguments).run()
        except Interrupted:
            print("told to stop before the other nodes have come", file=sys.stderr, flush=True)
            return PREEMPTED
        except NodesUnreachableError as error:
            print(error, file=sys.stderr, flush=True)
            return FAILED


class _Launcher:
    """This node's part in the starts of a run. The first node to come says what is run."""

    def __init__(self, tree: dict[str, Any], rendezvous: Rendezvous, signals: SignalHandler, arguments: Sequence[str]):
        launch = read_config(tree).launch
        self.rendezvous, self.signals, self.arguments = rendezvous, signals, arguments
        self.nproc = choose_nproc(launch.nproc_per_node, launch.device)
        self.threads, self.restarts = choose_threads(launch.threads_per_worker, self.nproc), launch.max_restarts
        self.world = rendezvous.next_world(self.nproc, 0, lambda: signals.signal)
        told = json.loads(rendezvous.broadcast("config", lambda: json.dumps(_validated(tree, self.world))))
        if "faults" in told:
            raise ValueError(told["faults"])
        self.tree = told["config"]
        self.rounds, self.folder = self.tree["rounds"], RunDir(Path(self.tree["run_dir"]))

    def run(self) -> int:
        """The exit code of the run, when no further start is of use."""
        starts = failures = 0
        while True:
            state, ended = self._start()
            if state["status"] != "crashed" or state.get("final") or self.signals.signal or failures == self.restarts:
                _report_status(self.folder, state, ended)
                return CODES[state["status"]]
            starts += 1
            failures += isinstance(ended, WorkerFailure)
            again = f"restart {failures} of {self.restarts}" if isinstance(ended, WorkerFailure) else "started again"
            print(f"{ended}; {again}", file=sys.stderr, flush=True)
            self.world = self.rendezvous.next_world(self.nproc, starts, lambda: self.signals.signal)

    def _start(self) -> tuple[RunState, WorkerFailure | MembershipChanged | None]:
        """How the run stands after one more start of its workers, and why that ended."""
        _clear_status(self.folder, self.rounds)
        environment = {RESOLVED: json.dumps(self.tree), RESTART: str(self.world.restart)}
        changed = self.rendezvous.membership_changed
        with start_workers(self.world, self.threads, self.signals, environment, self.arguments, changed) as workers:
            ended = workers.wait()
            state = self.folder.state()  # before the other workers, told to leave, write theirs
            if ended:
                self.rendezvous.announce_restart()
        if (
            state.get("status") == "preempted"
            and not self.signals.signal
            and self.rendezvous.membership_changed(RESTART_NOTICE_SECONDS)
        ):
            state, ended = {}, MembershipChanged()  # they were told by the workers of a node that begins again
        state = _resolve_status(state, ended, self.signals)
        _write_status(self.folder, state)
        return state, ended


def _validated(tree: dict[str, Any], world: World) -> dict[str, Any]:
    """The configuration that all nodes run, or what is wrong with it."""
    config, folder = read_config(tree), RunDir(Path(tree["run_dir"]))
    try:
        folder.check(tree)
        silo_sizes(config.silos, world.nodes, folder.num_clients())
    except ValueError as error:
        return {"faults": str(error)}
    return {"config": tree}


def _clear_status(folder: RunDir, rounds: int) -> None:
    """Whatever an earlier start wrote to state.json must not be taken for the word of this one."""
    if folder.status() not in ("", "bad_input") and not folder.has_finished(rounds):
        folder.set_status("running")


def _resolve_status(
    state: RunState, ended: WorkerFailure | MembershipChanged | None, signals: SignalHandler
) -> RunState:
    """How the run stands, when the workers said `state` and ended like this."""
    if state.get("status") in ("finished", "bad_input", "preempted"):
        return state
    if signals.signal and (ended is None or (isinstance(ended, WorkerFailure) and -ended.code in STOP_SIGNALS)):
        return {"status": "preempted"}  # before the workers could take the signal
    if ended is None:
        return {"status": "bad_input"}  # found before there was a folder, and said
    if state.get("status") == "crashed":
        return state
    return {"status": "crashed", "error": str(ended)} | (
        {"rank": ended.rank} if isinstance(ended, WorkerFailure) else {}
    )


def _write_status(folder: RunDir, state: RunState) -> None:
    """Writes it to state.json, unless it stands there or there is no folder."""
    if folder.path.exists() and folder.state() != state:
        folder.set_status(**state)


def _report_status(folder: RunDir, state: RunState, ended: WorkerFailure | MembershipChanged | None) -> None:
    """Says why the run is not finished, if the workers have not."""
    if state["status"] == "preempted":
        said = "preempted"
    elif ended and state.get("error") in (None, str(ended)):
        said = str(ended)
    else:
        return
    print(f"{said}; go on with run_dir={folder.path}", file=sys.stderr, flush=True)
