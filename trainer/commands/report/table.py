"""The table of a report: a row for each configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from trainer.commands.report.baselines import baselines
from trainer.commands.report.summary import Configuration, Report, Spread
from trainer.loggers import HEADLINES
from trainer.loggers.messages import number
from trainer.utils.text import format_bytes

MISSING = "–"
WORST = tuple(f"clients/worst_{name}" for name in HEADLINES)


class Cell(NamedTuple):
    """A text, and the number that it is sorted by; None if it is not a number."""

    text: str
    value: float | None = None


class TableColumn(NamedTuple):
    """A column: heading, whether it shows a setting, a cell for each configuration."""

    heading: str
    is_setting: bool
    cells: list[Cell]


def columns(report: Report) -> list[TableColumn]:
    """Return the columns, without those that would be empty."""
    groups = report.configurations
    settings = [
        TableColumn(heading, True, [_setting(group.cells[index]) for group in groups])
        for index, heading in enumerate(report.headings)
    ] or [TableColumn("configuration", True, [Cell(group.label) for group in groups])]
    worst = next((name for name in WORST if report.has(name)), None)
    metrics = {
        report.score: _spread_of(report.score),
        **({"worst client": _spread_of(worst)} if worst and worst != report.score else {}),
        "seeds": lambda group: Cell(group.seeds, len(group.counted)),
        "examples/s": _mean_of("examples_per_second", number),
        "seconds": _mean_of("seconds", number),
        **({"between silos": _mean_of("bytes_between_silos", format_bytes)} if _moves_bytes(report) else {}),
    }
    measured = [TableColumn(name, False, list(map(cell, groups))) for name, cell in metrics.items()]
    texts = {"baselines": baselines(report), "unfinished": [group.status_text for group in groups]}
    return (
        settings
        + measured
        + [TableColumn(name, False, [*map(Cell, cells)]) for name, cells in texts.items() if any(cells)]
    )


def _moves_bytes(report: Report) -> bool:
    return any(record.metrics.get("bytes_between_silos") for record in report.records)


def _setting(text: str) -> Cell:
    try:
        return Cell(text, float(text))
    except ValueError:
        return Cell(text)


def _spread_of(name: str) -> Callable[[Configuration], Cell]:
    return lambda group: Cell(spread_text(group.spread(name)), _finite(group.spread(name).mean))


def _mean_of(name: str, format_number: Callable[[float], str]) -> Callable[[Configuration], Cell]:
    return lambda group: number_cell(group.spread(name).mean, format_number)


def number_cell(value: float | None, format_number: Callable[[float], str] = number) -> Cell:
    """Return the cell of a number, a dash for None and NaN."""
    return Cell(MISSING) if value is None or math.isnan(value) else Cell(format_number(value), _finite(value))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def spread_text(spread: Spread) -> str:
    """Format mean and deviation with the same number of decimals.

    >>> spread_text(Spread(0.97216, 0.00312, 3))
    '0.9722 ± 0.0031'
    """
    if not spread.runs:
        return MISSING
    mean = number(spread.mean)
    if not math.isfinite(spread.deviation):
        return mean
    decimals = len(mean.partition(".")[2])
    return f"{mean} ± {number(spread.deviation) if 'e' in mean else f'{spread.deviation:,.{decimals}f}'}"
