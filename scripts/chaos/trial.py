"""A case, run untouched and run with kills, and what came of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from scripts.chaos.cases import COMMON
from scripts.chaos.compare import differences
from scripts.chaos.killer import Killer
from scripts.chaos.kills import Kill, Kind
from scripts.chaos.watch import under_way
from trainer.config.compose import compose_tree

IDLE_RUNS = 5  # so many in a row without a kill are not followed by another


@dataclass(frozen=True)
class Trial:
    """A run with kills.

    recoveries  seconds from a kill to the next step of all ranks, for kills after which there was one
    faults      what should not be, as sentences
    """

    case: str
    number: int
    kills: tuple[Kill, ...]
    recoveries: tuple[float, ...]
    seconds: float
    errors: tuple[str, ...]

    def __str__(self) -> str:
        verdict = "NOT EQUAL" if self.errors else "equal"
        return f"{self.case}, run {self.number}: {len(self.kills)} kills in {self.seconds:.0f} s: {verdict}"


class Case:
    """A run to be disturbed, and its runs in a folder: `<case>-alone`, `<case>-1`, `<case>-2`, ..."""

    def __init__(self, name: str, overrides: Sequence[str], rounds: int, folder: Path):
        self.name, self.folder, self.runs = name, folder, 0
        self.alone = folder / f"{name}-alone"
        self.overrides = [*COMMON, *overrides, f"rounds={rounds}"]
        self.start_seconds = 0.0

    def run_until_done(self, planned: list[Kind], random: Random) -> list[Trial]:
        """Runs it untouched, and then with kills until all that are planned are done, or do not come about."""
        self.run_alone()
        trials: list[Trial] = []
        while planned and (len(trials) < IDLE_RUNS or any(trial.kills for trial in trials[-IDLE_RUNS:])):
            trials.append(self.disturb(planned, random))
        return trials

    def run_alone(self) -> None:
        """Runs it untouched."""
        tree = self._tree(self.alone, "launch.max_restarts=0")
        with under_way(tree, self.alone, tree["launch"]["nproc_per_node"]) as run:
            run.wait(lambda: False)
        assert run.launcher.exitcode == 0, run.said.read_text()
        assert run.start_seconds is not None
        self.start_seconds = run.start_seconds
        seconds = time.monotonic() - run.began
        print(f"{self.name}, alone: {seconds:.0f} s, the first step after {self.start_seconds:.1f} s", flush=True)

    def disturb(self, planned: list[Kind], random: Random) -> Trial:
        """Runs it with as many of the planned kills as fit in, which leave the plan; prints a line for each."""
        self.runs += 1
        folder = self.folder / f"{self.name}-{self.runs}"
        tree = self._tree(folder)
        sums = ("scalars",) if tree["silos"] == 1 else ("scalars", "vectors")
        with under_way(tree, folder, tree["launch"]["nproc_per_node"]) as run:
            killer = Killer(run, random, self.start_seconds, sums)
            for kill in killer.work_off(planned):
                print(f"{self.name:<12} {kill}", flush=True)
            run.wait(lambda: False)
        seconds = time.monotonic() - run.began
        errors = self._errors(folder, run.launcher.exitcode, run.said)
        trial = Trial(self.name, self.runs, tuple(killer.kills), tuple(run.recoveries), seconds, errors)
        print("\n".join([str(trial), *errors]), flush=True)
        if not errors:
            shutil.rmtree(folder)
        return trial

    def _tree(self, folder: Path, *others: str) -> dict[str, Any]:
        return compose_tree([*self.overrides, *others, f"run_dir={folder}"])

    def _errors(self, folder: Path, code: int | None, said: Path) -> tuple[str, ...]:
        """Return what must not be: another end than that of the untouched run, another failure than our kills."""
        if code != 0:
            return (f"{folder.name} ended with exit code {code}: {said}",)
        restarts = [line for line in said.read_text().splitlines() if "; restart " in line]
        own = [f"{line}: {said}" for line in restarts if "was killed by SIGKILL" not in line]
        return tuple(f"{folder.name}: {fault}" for fault in (*own, *differences(self.alone, folder)))
