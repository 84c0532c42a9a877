"""How numbers, rounds and results are said on the console. Plain ASCII, so any log can hold them."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainer.utils.metric_direction import HEADLINES

Span = str | tuple[str, str]  # a text, or a text and its style on a terminal

NAME_STYLE = "bold"
NOTE_STYLE = "yellow"


def number(value: float | int) -> str:
    """A number to read: four significant digits, and from 1,000 on whole with separators.

    >>> [number(value) for value in (0.97216, 0.5, 12345.6, 3, 1e-5, 1e12, float("nan"))]
    ['0.9722', '0.5000', '12,346', '3', '1.000e-05', '1.000e+12', 'nan']
    """
    if isinstance(value, int):
        return f"{value:,}"
    rounded = abs(float(f"{value:.4g}"))
    if 1_000 <= rounded < 1e9:
        return f"{value:,.0f}"
    return f"{value:#.4g}"


def progress(fraction: float, examples_per_second: float, loss: float, seconds_left: float) -> str:
    """Where the run is: share done, loss, rate, and time left unless it is not finite."""
    parts = [f"{fraction:6.1%}", f"loss {number(loss)}", f"{number(examples_per_second)} examples/s"]
    if math.isfinite(seconds_left):
        parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
    return "  ".join(parts)


def round_line(metrics: Mapping[str, float | int], rounds: int) -> list[Span]:
    """What one round gave; only what was measured in it is said."""
    width = len(str(rounds))
    parts = [f"{label} {number(metrics[key])}" for key, label in _headlines(metrics)]
    if unit := next((unit for unit in ("tokens", "examples") if f"{unit}_per_second" in metrics), None):
        parts.append(f"{number(metrics[f'{unit}_per_second'])} {unit}/s")
    if math.isfinite(metrics.get("mfu", math.nan)):
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if "seconds" in metrics:
        parts.append(f"{number(metrics['seconds'])} s")
    head = (f"round {metrics['round']:>{width}}/{rounds}", NAME_STYLE)
    return [head, *("  " + part for part in parts), *_slowest(metrics)]


def _slowest(metrics: Mapping[str, float | int]) -> list[Span]:
    """The silo that the others waited for, and what it spent most of its time on."""
    if "slowest/silo" not in metrics:
        return []
    doing = max(("data", "compute"), key=lambda name: metrics[f"slowest/{name}"])
    seconds = number(metrics[f"slowest/{doing}"])
    return [(f"  slowest silo {metrics['slowest/silo']}: {doing} {seconds} s", NOTE_STYLE)]


def _headlines(metrics: Mapping[str, float | int]) -> list[tuple[str, str]]:
    """Keys and labels of the train loss and, for validation and test, of the most telling metric there is."""
    found = [("train/loss", "train loss")] if "train/loss" in metrics else []
    for split in ("validation", "test"):
        present = [metric for metric in HEADLINES if f"{split}/{metric}" in metrics]
        found += [(f"{split}/{metric}", f"{split} {metric}") for metric in present[:1]]
    return found


def summary(result: Mapping[str, Any], folder: Path | None) -> list[list[Span]]:
    """The result of a run, a line a number or text, and the command that shows its charts.

    Lists and mappings are left to the result's file, and so are single clients, of which there can be thousands.
    """
    rows = {key: _format_value(value) for key, value in result.items() if _is_shown(key, value)}
    if folder:
        rows["run folder"] = str(folder)
        rows["TensorBoard"] = f"{_tensorboard()} --logdir {shlex.quote(str(folder))}"
    width = max(map(len, rows))
    return [[(name.ljust(width), NAME_STYLE), "  " + value] for name, value in rows.items()]


def _tensorboard() -> str:
    """The command, as it is found from here: by its name, or beside the running Python."""
    if shutil.which("tensorboard"):
        return "tensorboard"
    beside = Path(sys.executable).with_name("tensorboard")
    return shlex.quote(str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside))


def _is_shown(key: str, value: object) -> bool:
    return isinstance(value, str | int | float) and not key.startswith("client/")


def _format_value(value: str | float | int) -> str:
    return str(value) if isinstance(value, str | bool) else number(value)
