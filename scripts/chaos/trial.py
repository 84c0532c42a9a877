"""A case: its undisturbed run, its runs with kills, and their outcomes."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from scripts.chaos.cases import CASES, COMMON, SHARDED_CASES
from scripts.chaos.compare import differences
from scripts.chaos.killer import Killer
from scripts.chaos.kills import Hit, Kind
from scripts.chaos.watch import under_way
from trainer.config.compose import compose_tree

IDLE_RUNS = 5  # the limit of consecutive runs without a kill


@dataclass(frozen=True)
class Trial:
    """A run with kills.

    Attributes:
        recoveries: seconds from a kill to the next step of all ranks, for kills that were followed by one.
        errors: the differences from the undisturbed run, as sentences.
    """

    case: str
    number: int
    kills: tuple[Hit, ...]
    recoveries: tuple[float, ...]
    seconds: float
    errors: tuple[str, ...]

    def __str__(self) -> str:
        verdict = "NOT EQUAL" if self.errors else "equal"
        return f"{self.case}, run {self.number}: {len(self.kills)} kills in {self.seconds:.0f} s: {verdict}"


class Case:
    """A run to disturb, and its runs in a folder: `<case>-alone`, `<case>-1`, `<case>-2`, ..."""

    def __init__(self, name: str, rounds: int, folder: Path):
        self.name, self.folder, self.runs = name, folder, 0
        self.alone = folder / f"{name}-alone"
        self.overrides = [*COMMON, *(CASES | SHARDED_CASES)[name], f"rounds={rounds}"]
        self.forked = name in SHARDED_CASES
        self.start_seconds = 0.0

    def run_until_done(self, planned: list[Kind], random: Random) -> list[Trial]:
        """Run it undisturbed, then with kills until all planned ones are done or no kill happens any more."""
        self.run_alone()
        trials: list[Trial] = []
        while planned and (len(trials) < IDLE_RUNS or any(trial.kills for trial in trials[-IDLE_RUNS:])):
            trials.append(self.disturb(planned, random))
        return trials

    def run_alone(self) -> None:
        """Run it undisturbed."""
        tree = self._tree(self.alone, "launch.max_restarts=0")
        with under_way(tree, self.alone, tree["launch"]["nproc_per_node"], self.forked) as run:
            run.wait(lambda: False)
        assert run.launcher.exitcode == 0, run.log.read_text()
        assert run.start_seconds is not None
        self.start_seconds = run.start_seconds
        seconds = time.monotonic() - run.began
        print(f"{self.name}, alone: {seconds:.0f} s, the first step after {self.start_seconds:.1f} s", flush=True)

    def disturb(self, planned: list[Kind], random: Random) -> Trial:
        """Run it with as many of the planned kills as possible, remove them from the plan, and print each."""
        self.runs += 1
        folder = self.folder / f"{self.name}-{self.runs}"
        tree = self._tree(folder)
        sums = ("scalars",) if tree["silos"] == 1 else ("scalars", "vectors")
        with under_way(tree, folder, tree["launch"]["nproc_per_node"], self.forked) as run:
            killer = Killer(run, random, self.start_seconds, sums)
            for kill in killer.work_off(planned):
                print(f"{self.name:<12} {kill}", flush=True)
            run.wait(lambda: False)
        seconds = time.monotonic() - run.began
        errors = self._errors(folder, run.launcher.exitcode, run.log)
        trial = Trial(self.name, self.runs, tuple(killer.kills), tuple(run.recoveries), seconds, errors)
        print("\n".join([str(trial), *errors]), flush=True)
        if not errors:
            shutil.rmtree(folder)
        return trial

    def _tree(self, folder: Path, *others: str) -> dict[str, Any]:
        return compose_tree([*self.overrides, *others, f"run_dir={folder}"])

    def _errors(self, folder: Path, code: int | None, log: Path) -> tuple[str, ...]:
        """Return the failures that were not caused by a kill, and the differences from the undisturbed run."""
        if code != 0:
            return (f"{folder.name} ended with exit code {code}: {log}",)
        restarts = [line for line in log.read_text().splitlines() if "; restart " in line]
        own = [f"{line}: {log}" for line in restarts if "was killed by SIGKILL" not in line]
        return tuple(f"{folder.name}: {fault}" for fault in (*own, *differences(self.alone, folder)))
