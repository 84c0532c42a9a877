"""The table of a report, as texts: one row a configuration, on the console and on the page alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from trainer.commands.report.baselines import baselines
from trainer.commands.report.summary import Configuration, Report, Spread
from trainer.loggers import HEADLINES
from trainer.loggers.messages import number

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
MISSING = "–"
WORST = tuple(f"clients/worst_{name}" for name in HEADLINES)


class Cell(NamedTuple):
    """A text, and the number that it is sorted by if it is one."""

    text: str
    value: float | None = None


class TableColumn(NamedTuple):
    """A column: its heading, whether it is a setting of the configurations, and a cell a configuration."""

    heading: str
    is_setting: bool
    cells: list[Cell]


def columns(report: Report) -> list[TableColumn]:
    """All columns, those in which nothing would be said left out."""
    between = baselines(report)
    settings = [
        TableColumn(heading, True, [_setting(each.cells[place]) for each in report.configurations])
        for place, heading in enumerate(report.headings)
    ] or [TableColumn("configuration", True, [Cell(each.label) for each in report.configurations])]
    worst = next((name for name in WORST if report.has(name)), None)
    figures = {
        report.score: _spread_of(report.score),
        **({"worst client": _spread_of(worst)} if worst and worst != report.score else {}),
        "seeds": lambda each: Cell(each.seeds, len(each.counted)),
        "examples/s": _mean_of("examples_per_second", number),
        "seconds": _mean_of("seconds", number),
        **({"between silos": _mean_of("bytes_between_silos", amount)} if _moves_bytes(report) else {}),
    }
    said = [TableColumn(name, False, list(map(cell, report.configurations))) for name, cell in figures.items()]
    brackets_column = TableColumn("brackets", False, list(map(Cell, between)))
    unfinished = TableColumn("unfinished", False, [Cell(each.status_text) for each in report.configurations])
    return settings + said + [each for each in (brackets_column, unfinished) if any(cell.text for cell in each.cells)]


def _moves_bytes(report: Report) -> bool:
    return any(record.metrics.get("bytes_between_silos") for record in report.records)


def _setting(text: str) -> Cell:
    try:
        return Cell(text, float(text))
    except ValueError:
        return Cell(text)


def _spread_of(name: str) -> Callable[[Configuration], Cell]:
    return lambda each: Cell(spread_text(each.spread(name)), _finite(each.spread(name).mean))


def _mean_of(name: str, wording: Callable[[float], str]) -> Callable[[Configuration], Cell]:
    return lambda each: number_cell(each.spread(name).mean, wording)


def number_cell(value: float | None, wording: Callable[[float], str] = number) -> Cell:
    """A number in words, or a dash for none."""
    return Cell(MISSING) if value is None or math.isnan(value) else Cell(wording(value), _finite(value))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def spread_text(spread: Spread) -> str:
    """Mean and deviation with the same number of decimals: 0.9722 ± 0.0031.

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


def amount(count: float) -> str:
    """Bytes in the unit that fits: 12.35 MB.

    >>> [amount(0), amount(999), amount(12_345_678)]
    ['0 B', '999 B', '12.35 MB']
    """
    exponent = min(int(math.log10(count) // 3), len(UNITS) - 1) if count >= 1 else 0
    return f"{count / 1000**exponent:.4g} {UNITS[exponent]}"
