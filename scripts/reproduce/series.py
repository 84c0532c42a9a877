"""Runs the trials of a table that are not over, some at a time. What is interrupted goes on at the next call."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from scripts.reproduce.trials import Series, Trial

POLL_INTERVAL_SECONDS = 0.5  # for runs that have ended
LOOKS_PER_READING = 10  # of the rounds of those that go on, which takes a while where there are thousands
TRAINER = (sys.executable, "-m", "trainer")
PREEMPTED = 75  # the exit code of a run that was told to leave


class Runner:
    """The processes of a series, `jobs` workers at a time, for the trials whose names contain `only`."""

    def __init__(self, series: Series, only: str, jobs: int):
        self.series, self.jobs = series, jobs
        self.waiting = [trial for trial in series.trials if only in trial.name and not series.is_over(trial)]
        self.live: dict[Trial, subprocess.Popen[bytes]] = {}
        self.told: set[Trial] = set()
        self.failed: list[str] = []

    def run(self) -> list[str]:
        """Run all trials; return sentences about those that failed."""
        print(f"{len(self.waiting)} of {len(self.series.trials)} runs are to be done", flush=True)
        looks = 0
        with self._ended():
            while self.waiting or self.live:
                while self.waiting and self._has_room(self.waiting[0]):
                    self._start(self.waiting.pop(0))
                time.sleep(POLL_INTERVAL_SECONDS)
                looks += 1
                self._note_ends()
                if looks % LOOKS_PER_READING == 0:
                    self._tell_to_leave()
        return self.failed

    def _has_room(self, trial: Trial) -> bool:
        return not self.live or sum(other.workers for other in self.live) + trial.workers <= self.jobs

    def _start(self, trial: Trial) -> None:
        if self.series.is_over(trial):  # a rival has been faster
            return
        folder = self.series.folder
        folder.mkdir(parents=True, exist_ok=True)
        command = [*TRAINER, *trial.arguments(folder)]
        with open(folder / f"{trial.name}.log", "ab") as log:
            # In a session of its own: what a terminal sends must not reach it twice, which would end it at once.
            self.live[trial] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _note_ends(self) -> None:
        for trial, process in list(self.live.items()):
            if process.poll() is not None:
                del self.live[trial]
                print(f"{trial.name:<48} {self._said(trial, process.returncode)}", flush=True)

    def _tell_to_leave(self) -> None:
        """Those that are over before their end."""
        for trial in set(self.live) - self.told:
            if self.series.is_over(trial):
                self.told.add(trial)
                self.live[trial].terminate()

    def _said(self, trial: Trial, code: int) -> str:
        """How a run ended; of one that is not over this is noted as a failure."""
        if self.series.has_diverged(trial):
            return "has diverged"
        if not self.series.is_over(trial):
            said = "was told to leave" if code == PREEMPTED else f"failed with exit code {code}"
            self.failed.append(f"{trial.name} {said}: {self.series.folder / trial.name}.log")
            return said
        rounds = self.series.rounds(trial)
        there = "" if rounds is None else f", {trial.target:.1%} at round {rounds:.1f}"
        return f"ended after {self.series.rounds_done(trial)} rounds{there}"

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """When the block is left, by SIGTERM too, so is every run: it saves and leaves."""
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
        try:
            yield
        finally:
            for trial in set(self.live) - self.told:
                self.live[trial].terminate()
            for process in self.live.values():
                process.wait()
            signal.signal(signal.SIGTERM, before)
