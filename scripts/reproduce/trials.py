"""The runs of a table: their configurations, and whether they are decided."""

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

    Attributes:
        cell: the cell of the table; the trials of a cell differ only in learning rate or seed.
        overrides: its overrides, besides its folder.
        target: the test accuracy at which it ends; None: it runs to its end.
        workers: the number of its processes.
        teacher: the name of the trial before it whose model it learns from; None: of none.
        init: the name of the trial before it with whose model it begins; None: with a new one.
    """

    cell: str
    lr: float
    seed: int
    overrides: tuple[str, ...]
    target: float | None = None
    workers: int = 1
    teacher: str | None = None
    init: str | None = None

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.cell}-lr{self.lr:g}-seed{self.seed}"

    def arguments(self, folder: Path) -> list[str]:
        """Return the overrides of `python -m trainer`, with the run's folder in this folder."""
        own = [
            f"optimizer.lr={self.lr:g}",
            f"seed={self.seed}",
            f"launch.nproc_per_node={self.workers}",
            "launch.threads_per_worker=1",
        ]
        taught = ["task=distillation", f"task.teacher={folder / self.teacher}"] if self.teacher else []
        begun = [f"model.init={folder / self.init / 'model.safetensors'}"] if self.init else []
        return [*taught, *begun, *self.overrides, *own, f"run_dir={folder / self.name}"]


@dataclass(frozen=True)
class Series:
    """The trials of a table, and the folder with their runs."""

    trials: Sequence[Trial]
    folder: Path

    def of(self, trial: Trial) -> Path:
        """Return the folder of a trial."""
        return self.folder / trial.name

    def of_cell(self, cell: str, seed: int) -> list[Trial]:
        """Return the trials of a cell and seed, which differ only in learning rate."""
        return [trial for trial in self.trials if (trial.cell, trial.seed) == (cell, seed)]

    def rounds(self, trial: Trial) -> float | None:
        """Return the rounds that a trial took to its target; None if it has not reached it."""
        return None if trial.target is None else rounds_to_target(*curve(self.of(trial)), trial.target)

    def rounds_done(self, trial: Trial) -> int:
        """Return the rounds that a trial has completed."""
        rounds, _ = curve(self.of(trial), "round")
        return int(rounds[-1]) if len(rounds) else 0

    def has_diverged(self, trial: Trial) -> bool:
        """Return whether its numbers are unusable, so that another start would be useless."""
        state = RunDir(self.of(trial)).state()
        return state.get("status") == "crashed" and state.get("final", False)

    def is_over(self, trial: Trial) -> bool:
        """Return whether it has ended or reached its target, or can no longer be the first of its cell to do so."""
        if RunDir(self.of(trial)).status() == "finished" or self.has_diverged(trial):
            return True
        return trial.target is not None and self.rounds_done(trial) >= self._fewest(trial)

    def best(self, cell: str, seed: int) -> Trial | None:
        """Return the trial of a cell that took the fewest rounds to the target; None if none has reached it."""
        there = [trial for trial in self.of_cell(cell, seed) if self.rounds(trial) is not None]
        return min(there, key=lambda trial: self.rounds(trial) or math.inf, default=None)

    def leader(self, cell: str, seed: int) -> Trial | None:
        """Return the best trial of a cell, or the closest to the target if none has reached it; None if none began."""
        peaks = {trial: curve(self.of(trial))[1].max(initial=0) for trial in self.of_cell(cell, seed)}
        begun = [trial for trial, peak in peaks.items() if peak]
        return self.best(cell, seed) or max(begun, key=peaks.__getitem__, default=None)

    def _fewest(self, trial: Trial) -> float:
        """Return the fewest rounds to the target of the trials of this cell; infinite if none has reached it."""
        best = self.best(trial.cell, trial.seed)
        return math.inf if best is None else self.rounds(best) or math.inf
