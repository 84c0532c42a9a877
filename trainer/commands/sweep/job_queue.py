"""Queue of the jobs that run on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from trainer.commands.exit_codes import PREEMPTED
from trainer.commands.sweep.job import Job, Outcome
from trainer.distributed.launch.signals import SignalHandler, handle_stop_signals, reraise_signal
from trainer.distributed.launch.subprocesses import Command, CommandBusyError, ResourceSlot
from trainer.loggers import make_terminal
from trainer.loggers.messages import NAME_STYLE, NOTE_STYLE, number
from trainer.utils.text import first_few

POLL_INTERVAL_SECONDS = 0.05
MAX_NAMED = 4  # running jobs on one line


class JobQueue:
    """Runs jobs, as many at a time as there are slots, and prints the outcome of each.

    Args:
        jobs: to run, in this order.
        slots: disjoint parts of the machine.
        objective: metric that compares jobs.
        before: number of jobs of the sweep that were run before.
        total: number of jobs of the sweep, if known.
        rank: of this process, where several run each job together, as the tasks of a SLURM step do.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Sequence[ResourceSlot],
        objective: str,
        before: int = 0,
        total: int | None = None,
        rank: int = 0,
    ):
        self._waiting, self._free = list(jobs), list(slots)
        self._objective, self._rank = objective, rank
        self._before, self._total = before, total or before + len(jobs)
        self._terminal = make_terminal(sys.stdout)
        self._running: dict[Job, Command] = {}
        self._outcomes: dict[Job, Outcome] = {}

    def run(self) -> dict[Job, Outcome]:
        """Run the jobs and return their outcomes.

        A stop signal is forwarded to them, and raised again when they have ended.
        """
        with handle_stop_signals() as stop:
            forwarded = 0
            while self._running or (self._waiting and not stop.signal):
                while self._waiting and self._free and not stop.signal:
                    self._begin(self._waiting.pop(0))
                time.sleep(POLL_INTERVAL_SECONDS)
                forwarded = self._forward_stop(stop, forwarded)
                for job in [job for job, command in self._running.items() if command.exit_code() is not None]:
                    self._finish(job)
        self._terminal.close()
        if stop.signal:
            reraise_signal(stop.signal)
        return self._outcomes

    def _begin(self, job: Job) -> None:
        if job.has_finished():
            self._report(job, job.outcome(self._objective), None)
            return
        try:
            self._running[job] = Command(job.arguments, job.log_of(self._rank), self._free[0])
        except CommandBusyError:
            self._report(job, Outcome("running", reason="running in another process"), None)
            return
        self._free.pop(0)
        names = "; ".join(first_few((running.name for running in self._running), MAX_NAMED))
        done = self._before + len(self._outcomes)
        self._terminal.progress(done / self._total, f"{done} of {self._total} jobs done; running: {names}")

    def _forward_stop(self, signals: SignalHandler, forwarded: int) -> int:
        """Forward new stop signals, at most two, and return how many have been."""
        due = int(signals.signal is not None) + int(signals.kill_requested)
        if due > forwarded:
            if not forwarded:
                self._terminal.line("the jobs save and stop; a second signal ends them at once")
            for command in self._running.values():
                command.terminate()
        return due

    def _finish(self, job: Job) -> None:
        command = self._running.pop(job)
        self._free.append(command.slot)
        outcome, code = job.outcome(self._objective), command.exit_code()
        if code and outcome.status in ("finished", "running"):  # state.json is of an earlier start
            outcome = Outcome("preempted" if code == PREEMPTED else "failed", reason=job.log_tail())
        self._report(job, outcome, time.monotonic() - command.begun)

    def _report(self, job: Job, outcome: Outcome, seconds: float | None) -> None:
        """Record and print the outcome of a job. `seconds` is None if there was nothing left to do."""
        self._outcomes[job] = outcome
        name = (job.name, NAME_STYLE)
        took = f"  {number(seconds)} s" if seconds is not None else "  already finished"
        if outcome.objective is not None:
            self._terminal.line(name, f"  {self._objective} {number(outcome.objective)}{took}")
        elif outcome.status == "preempted":
            self._terminal.line(name, f"  saved and stopped{took}")
        else:
            self._terminal.line(name, (f"  {outcome.status}", NOTE_STYLE), f"  see {job.log}")
            for line in outcome.reason.splitlines():
                self._terminal.line(f"  {line}")
