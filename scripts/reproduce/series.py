"""Run the unfinished trials of a table, several at a time. After an interruption the next call continues."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from scripts.reproduce.trials import Series, Trial

POLL_INTERVAL_SECONDS = 0.5  # between looks for ended runs
LOOKS_PER_READING = 10  # of the metrics of unfinished runs, which takes long if there are thousands of rounds
TRAINER = (sys.executable, "-m", "trainer")
PREEMPTED = 75  # the exit code of a preempted run


class Runner:
    """Runs a series, `jobs` workers at a time: the trials whose names contain `only`."""

    def __init__(self, series: Series, only: str, jobs: int):
        self.series, self.jobs = series, jobs
        self.waiting = [trial for trial in series.trials if only in trial.name and not series.is_over(trial)]
        self.live: dict[Trial, subprocess.Popen[bytes]] = {}
        self.stopped: set[Trial] = set()
        self.failed: list[str] = []

    def run(self) -> list[str]:
        """Run all trials; return sentences about those that failed."""
        print(f"{len(self.waiting)} of {len(self.series.trials)} runs are to be done", flush=True)
        looks = 0
        with self._ended():
            while self.waiting or self.live:
                while self.waiting and self._can_start(self.waiting[0]):
                    self._start(self.waiting.pop(0))
                time.sleep(POLL_INTERVAL_SECONDS)
                looks += 1
                self._note_ends()
                if looks % LOOKS_PER_READING == 0:
                    self._stop_decided()
        return self.failed

    def _can_start(self, trial: Trial) -> bool:
        has_room = not self.live or sum(other.workers for other in self.live) + trial.workers <= self.jobs
        return has_room and not {trial.teacher, trial.init} & {other.name for other in self.live}

    def _start(self, trial: Trial) -> None:
        if self.series.is_over(trial):  # a rival was faster
            return
        folder = self.series.folder
        folder.mkdir(parents=True, exist_ok=True)
        command = [*TRAINER, *trial.arguments(folder)]
        with open(folder / f"{trial.name}.log", "ab") as log:
            # In a new session: a signal of the terminal must not arrive twice, which would end the run at once.
            self.live[trial] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _note_ends(self) -> None:
        for trial, process in list(self.live.items()):
            if process.poll() is not None:
                del self.live[trial]
                print(f"{trial.name:<48} {self._said(trial, process.returncode)}", flush=True)

    def _stop_decided(self) -> None:
        """Stop the runs of trials that are decided before their end."""
        for trial in set(self.live) - self.stopped:
            if self.series.is_over(trial):
                self.stopped.add(trial)
                self.live[trial].terminate()

    def _said(self, trial: Trial, code: int) -> str:
        """Return how a run ended; an unfinished one is noted as failed."""
        if self.series.has_diverged(trial):
            return "has diverged"
        if not self.series.is_over(trial):
            outcome = "was preempted" if code == PREEMPTED else f"failed with exit code {code}"
            self.failed.append(f"{trial.name} {outcome}: {self.series.folder / trial.name}.log")
            return outcome
        rounds = self.series.rounds(trial)
        there = "" if rounds is None else f", {trial.target:.1%} at round {rounds:.1f}"
        return f"ended after {self.series.rounds_done(trial)} rounds{there}"

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """Stop every run when the block is left, also by SIGTERM: each saves and exits."""
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
        try:
            yield
        finally:
            for trial in set(self.live) - self.stopped:
                self.live[trial].terminate()
            for process in self.live.values():
                process.wait()
            signal.signal(signal.SIGTERM, before)
