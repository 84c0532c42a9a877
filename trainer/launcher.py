"""Starts the workers of this machine, and again after a failure; an exit code says what became of the run.

What the workers know of it they write to state.json. The launcher adds what they could not: that one was killed, or
that they were told to stop before they had begun.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import read_config
from trainer.folder import RunFolder
from trainer.launch.processes import TRAINER, Failure, Stop, choose_nproc, choose_threads, heed_signals, started
from trainer.topology import silo_sizes

FINISHED, FAILED, BAD_INPUT, PREEMPTED = os.EX_OK, 1, 2, os.EX_TEMPFAIL
CODES = {"finished": FINISHED, "crashed": FAILED, "bad_input": BAD_INPUT, "preempted": PREEMPTED}

# What workers learn from the launcher: the resolved configuration, and how often they were started again.
RESOLVED, RESTART = "SILOTRAIN_CONFIG", "SILOTRAIN_RESTART"

State = dict[str, Any]  # what state.json holds


def launch(tree: dict[str, Any], arguments: Sequence[str] = TRAINER) -> int:
    """The exit code of the run that a resolved configuration describes, when its workers have ended.

    Raises ValueError, before there are any, if the run does not fit its folder or this machine.
    """
    config = read_config(tree)
    folder = RunFolder(Path(tree["run_dir"]))
    folder.check(tree)
    nproc = choose_nproc(config.launch.nproc, config.launch.device)
    silo_sizes(config.silos, [0] * nproc)
    threads, restarts = choose_threads(config.launch.threads, nproc), config.launch.max_restarts
    restart = 0
    with heed_signals() as stop:
        while True:
            _forget(folder, config.rounds)
            environment = {RESOLVED: json.dumps(tree), RESTART: str(restart)}
            with started(nproc, threads, stop, environment, arguments) as workers:
                failure = workers.wait()
                state = folder.state()  # before the other workers, told to leave, write theirs
            state = _judge(state, failure, stop)
            _settle(folder, state)
            if state["status"] != "crashed" or state.get("final") or stop.signal or restart == restarts:
                _tell(folder, state, failure)
                return CODES[state["status"]]
            restart += 1
            print(f"{failure}; restart {restart} of {restarts}", file=sys.stderr, flush=True)


def _forget(folder: RunFolder, rounds: int) -> None:
    """Whatever an earlier start wrote to state.json must not be taken for the word of this one."""
    if folder.status() not in ("", "bad_input") and not folder.has_finished(rounds):
        folder.set_status("running")


def _judge(state: State, failure: Failure | None, stop: Stop) -> State:
    """How the run stands, when the workers said `state` and ended like this."""
    if state.get("status") in ("finished", "bad_input", "preempted"):
        return state
    if stop.signal and (failure is None or failure.code == -signal.SIGTERM):
        return {"status": "preempted"}  # before the workers could take the signal
    if failure is None:
        return {"status": "bad_input"}  # found before there was a folder, and said
    if state.get("status") == "crashed":
        return state
    return {"status": "crashed", "rank": failure.rank, "error": str(failure)}


def _settle(folder: RunFolder, state: State) -> None:
    """Writes it to state.json, unless it stands there or there is no folder."""
    if folder.path.exists() and folder.state() != state:
        folder.set_status(**state)


def _tell(folder: RunFolder, state: State, failure: Failure | None) -> None:
    """Says why the run is not finished, if the workers have not."""
    if state["status"] == "preempted":
        said = "preempted"
    elif failure and state.get("error") in (None, str(failure)):
        said = str(failure)
    else:
        return
    print(f"{said}; go on with run_dir={folder.path}", file=sys.stderr, flush=True)
