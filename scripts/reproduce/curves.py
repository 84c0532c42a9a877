"""Curves of a run: how soon it reached a target, and where it ended."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.loggers import read_jsonl

TEST = "test/accuracy"


def rounds_to_target(rounds: np.ndarray, values: np.ndarray, target: float) -> float | None:
    """The round in which a curve crosses the target, the way of McMahan et al. 2017; None if it never does.

    Every value becomes the best so far, and the crossing is where the line between two rounds meets the target.
    `rounds` and `values` are of the rounds that were evaluated; values that are no number count as bad.
    """
    best = np.maximum.accumulate(np.nan_to_num(values, nan=-np.inf))
    place = int(np.searchsorted(best, target))
    if place == len(best):
        return None
    if place == 0 or not np.isfinite(best[place - 1]):
        return float(rounds[place])
    return float(np.interp(target, best[place - 1 : place + 1], rounds[place - 1 : place + 1]))


def curve(folder: Path, name: str = TEST) -> tuple[np.ndarray, np.ndarray]:
    """The rounds of a run that have the figure of this name, and the figure; empty before there are any."""
    path = folder / "metrics.jsonl"
    lines = [line for line in read_jsonl(path) if name in line] if path.exists() else []
    return np.array([line["round"] for line in lines]), np.array([line[name] for line in lines], dtype=float)


def final(folder: Path, name: str, last: int = 5) -> float:
    """The mean of a figure over the last rounds; nan if there are none."""
    _, values = curve(folder, name)
    return float(values[-last:].mean()) if len(values) else float("nan")
