"""Formatting of numbers, rounds and results for the console, in plain ASCII for the sake of logs."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainer.loggers.base import HEADLINES, TextSample

Span = str | tuple[str, str]  # text, or text and its style on a terminal

NAME_STYLE = "bold"
NOTE_STYLE = "yellow"


def number(value: float | int) -> str:
    """Format a number with four significant digits; from 1,000 on without decimals, with separators.

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
    """Format the progress of a run: fraction done, loss, rate, and remaining time if it is finite."""
    parts = [f"{fraction:6.1%}", f"loss {number(loss)}", f"{number(examples_per_second)} examples/s"]
    if math.isfinite(seconds_left):
        parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
    return "  ".join(parts)


def round_line(metrics: Mapping[str, float | int], rounds: int) -> list[Span]:
    """Format the metrics of a round that were measured in it: of each set of examples the first of `HEADLINES`."""
    width = len(str(rounds))
    parts = []
    for split, names in (("train", ("loss",)), ("validation", HEADLINES), ("test", HEADLINES)):
        if name := next((name for name in names if f"{split}/{name}" in metrics), None):
            parts.append(f"{split} {name} {number(metrics[f'{split}/{name}'])}")
    if unit := next((unit for unit in ("tokens", "examples") if f"{unit}_per_second" in metrics), None):
        parts.append(f"{number(metrics[f'{unit}_per_second'])} {unit}/s")
    if math.isfinite(metrics.get("mfu", math.nan)):
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if "seconds" in metrics:
        parts.append(f"{number(metrics['seconds'])} s")
    head = (f"round {metrics['round']:>{width}}/{rounds}", NAME_STYLE)
    spans: list[Span] = [head, *("  " + part for part in parts)]
    if "slowest/silo" in metrics:  # for which the others waited, with the longer of its activities
        activity = max(("data", "compute"), key=lambda name: metrics[f"slowest/{name}"])
        seconds = number(metrics[f"slowest/{activity}"])
        spans.append((f"  slowest silo {metrics['slowest/silo']}: {activity} {seconds} s", NOTE_STYLE))
    return spans


def sample_line(sample: TextSample) -> list[Span]:
    """Format a sample as one line. What could move the cursor, such as a newline, is escaped as in Python."""
    return ["  ", (_printable(sample.prompt), NAME_STYLE), " | ", _printable(sample.text)]


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def summary(result: Mapping[str, Any], folder: Path | None) -> list[list[Span]]:
    """Format the result of a run, a line per number or text, and the command that shows its charts.

    Lists, mappings and metrics of single clients, of which there may be thousands, are only in the result's file.
    """
    rows = {
        key: str(value) if isinstance(value, str | bool) else number(value)
        for key, value in result.items()
        if isinstance(value, str | int | float) and not key.startswith("client/")
    }
    if folder:
        rows["run folder"] = str(folder)
        rows["TensorBoard"] = f"{_tensorboard()} --logdir {shlex.quote(str(folder))}"
    width = max(map(len, rows))
    return [[(name.ljust(width), NAME_STYLE), "  " + value] for name, value in rows.items()]


def _tensorboard() -> str:
    """Return the command that starts TensorBoard: its name if on PATH, else its path beside the running Python."""
    if shutil.which("tensorboard"):
        return "tensorboard"
    beside = Path(sys.executable).with_name("tensorboard")
    return shlex.quote(str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside))
