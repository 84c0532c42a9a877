"""The runs of a table: what each is started with, and when it has shown what it is run for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.reproduce.curves import curve, rounds_to_target
from trainer.checkpoint.run_dir import RunDir


@dataclass(frozen=True)
class Trial:
    """One run of a table.

    cell       what of the table it counts for; the trials of one cell differ in learning rate or seed alone
    overrides  what it is started with, besides its folder
    target     test accuracy at which it has shown what it is run for; None: it runs to its end
    workers    processes that it takes
    """

    cell: str
    lr: float
    seed: int
    overrides: tuple[str, ...]
    target: float | None = None
    workers: int = 1

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.cell}-lr{self.lr:g}-seed{self.seed}"

    def arguments(self, folder: Path) -> list[str]:
        """The overrides of `python -m trainer`, for a run in its place in the folder."""
        own = [
            f"optimizer.lr={self.lr:g}",
            f"seed={self.seed}",
            f"launch.nproc_per_node={self.workers}",
            "launch.threads_per_worker=1",
        ]
        return [*self.overrides, *own, f"run_dir={folder / self.name}"]


@dataclass(frozen=True)
class Series:
    """The trials of a table, and the folder that holds theirs."""

    trials: Sequence[Trial]
    folder: Path

    def of(self, trial: Trial) -> Path:
        """The folder of a trial."""
        return self.folder / trial.name

    def of_cell(self, cell: str, seed: int) -> list[Trial]:
        """The trials that differ in learning rate alone."""
        return [trial for trial in self.trials if (trial.cell, trial.seed) == (cell, seed)]

    def rounds(self, trial: Trial) -> float | None:
        """The rounds that a trial took to its target; None if it has not reached it."""
        return None if trial.target is None else rounds_to_target(*curve(self.of(trial)), trial.target)

    def rounds_done(self, trial: Trial) -> int:
        """The rounds that a trial has done so far."""
        rounds, _ = curve(self.of(trial), "round")
        return int(rounds[-1]) if len(rounds) else 0

    def has_diverged(self, trial: Trial) -> bool:
        """Whether its numbers were of no use any more, so that starting it again would bring nothing."""
        state = RunDir(self.of(trial)).state()
        return state.get("status") == "crashed" and state.get("final", False)

    def is_over(self, trial: Trial) -> bool:
        """Whether it is at its end, or has reached its target, or cannot any more be the first of its cell to do so."""
        if RunDir(self.of(trial)).status() == "finished" or self.has_diverged(trial):
            return True
        return trial.target is not None and self.rounds_done(trial) >= self._fewest(trial)

    def best(self, cell: str, seed: int) -> Trial | None:
        """The trial of a cell that took the fewest rounds to the target; None if none has reached it."""
        there = [trial for trial in self.of_cell(cell, seed) if self.rounds(trial) is not None]
        return min(there, key=lambda trial: self.rounds(trial) or math.inf, default=None)

    def leader(self, cell: str, seed: int) -> Trial | None:
        """The best trial of a cell; if none has reached the target, the one that came closest; None if none began."""
        peaks = {trial: curve(self.of(trial))[1].max(initial=0) for trial in self.of_cell(cell, seed)}
        begun = [trial for trial, peak in peaks.items() if peak]
        return self.best(cell, seed) or max(begun, key=peaks.__getitem__, default=None)

    def _fewest(self, trial: Trial) -> float:
        """The fewest rounds that took a trial of this cell to the target; infinite if none is there."""
        best = self.best(trial.cell, trial.seed)
        return math.inf if best is None else self.rounds(best) or math.inf
