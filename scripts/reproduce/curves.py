"""Curves of a run: the rounds to a target, and the final value."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.loggers import read_jsonl

TEST = "test/accuracy"


def rounds_to_target(rounds: np.ndarray, values: np.ndarray, target: float) -> float | None:
    """Return the round in which a curve crosses the target, as McMahan et al. 2017 define it; None if it never does.

    Every value is replaced by the best so far, and the crossing is interpolated linearly between two rounds. `rounds`
    and `values` are those of the evaluated rounds; NaN counts as bad.
    """
    best = np.maximum.accumulate(np.nan_to_num(values, nan=-np.inf))
    place = int(np.searchsorted(best, target))
    if place == len(best):
        return None
    if place == 0 or not np.isfinite(best[place - 1]):
        return float(rounds[place])
    return float(np.interp(target, best[place - 1 : place + 1], rounds[place - 1 : place + 1]))


def curve(folder: Path, name: str = TEST) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounds of a run that have this metric, and its values; empty before there are any."""
    path = folder / "metrics.jsonl"
    lines = [line for line in read_jsonl(path) if name in line] if path.exists() else []
    return np.array([line["round"] for line in lines]), np.array([line[name] for line in lines], dtype=float)


def final(folder: Path, name: str, last: int = 5) -> float:
    """Return the mean of a metric over the last rounds; NaN if there are none."""
    _, values = curve(folder, name)
    return float(values[-last:].mean()) if len(values) else float("nan")
