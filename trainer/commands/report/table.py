"""The table of a report, a row for each configuration, and its output on the console."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from trainer.commands.report.baselines import baselines
from trainer.commands.report.summary import Report, Spread
from trainer.loggers import HEADLINES
from trainer.loggers.messages import number
from trainer.utils.tables import COLUMN_GAP, make_table
from trainer.utils.text import format_bytes, is_number

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
    table = [
        TableColumn(heading, True, [_setting(group.cells[index]) for group in groups])
        for index, heading in enumerate(report.headings)
    ] or [TableColumn("configuration", True, [Cell(group.label) for group in groups])]

    def add(heading: str, cells: list[Cell]) -> None:
        table.append(TableColumn(heading, False, cells))

    def add_mean(heading: str, name: str, format_number: Callable[[float], str] = number) -> None:
        add(heading, [number_cell(group.spread(name).mean, format_number) for group in groups])

    def add_spread(heading: str, name: str) -> None:
        spreads = [group.spread(name) for group in groups]
        add(heading, [Cell(spread_text(spread), _finite(spread.mean)) for spread in spreads])

    add_spread(report.score, report.score)
    measured = {name for record in report.records for name in record.metrics}
    worst = next((name for name in WORST if name in measured), report.score)
    if worst != report.score:
        add_spread("worst client", worst)
    add("seeds", [Cell(group.seeds, len(group.counted)) for group in groups])
    add_mean("examples/s", "examples_per_second")
    add_mean("seconds", "seconds")
    if any(record.metrics.get("bytes_between_silos") for record in report.records):
        add_mean("between silos", "bytes_between_silos", format_bytes)
    add("baselines", [Cell(text) for text in baselines(report)])
    add("unfinished", [Cell(group.status_text) for group in groups])
    return [column for column in table if any(cell.text for cell in column.cells)]


def _setting(text: str) -> Cell:
    return Cell(text, float(text) if is_number(text) else None)


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


MAX_UNFINISHED = 10  # listed runs


def show(report: Report, console: Console) -> None:
    """Print the table, and the status of the runs that have not finished."""
    runs, configurations = len(report.records), len(report.configurations)
    counts = f"{runs} run{'s' * (runs != 1)} of {configurations} configuration{'s' * (configurations != 1)}"
    console.print(Text(f"{counts}, best {report.score} first, ± deviation over seeds"))
    table_columns = columns(report)
    if table := fitting_table(table_columns, console.width):
        console.print(table)
    else:
        _show_paragraphs(report, table_columns, console)
    unfinished = [record for record in report.records if not record.has_finished]
    for record in unfinished[:MAX_UNFINISHED]:
        reason = f": {record.error}" if record.error else ""
        console.print(Text(f"{record.folder}: {record.status_text}{reason}"), soft_wrap=True)
    if len(unfinished) > MAX_UNFINISHED:
        console.print(f"and {len(unfinished) - MAX_UNFINISHED} more unfinished runs: --csv FILE lists all")


def fitting_table(columns: Sequence[TableColumn], width: int) -> Table | None:
    """Return the table; None if its lines would have more than `width` characters."""
    texts = [[column.heading, *(cell.text for cell in column.cells)] for column in columns]
    if sum(max(map(cell_len, column)) for column in texts) + COLUMN_GAP * (len(texts) - 1) > width:
        return None
    headings = [
        Column(Text(column.heading), justify="right" if _is_numeric(column) else "left", no_wrap=True)
        for column in columns
    ]
    return make_table(headings, zip(*(cells for _, *cells in texts), strict=True))


def _show_paragraphs(report: Report, columns: Sequence[TableColumn], console: Console) -> None:
    """Print paragraphs instead, for a narrow console or many settings."""
    for row, configuration in enumerate(report.configurations):
        console.print(Text(f"\n{configuration.label}", style="bold"))
        metrics = [(column.heading, column.cells[row].text) for column in columns if not column.is_setting]
        paragraph = "; ".join(f"{heading} {text}" for heading, text in metrics if text not in ("", MISSING))
        console.print(Padding(Text(paragraph), (0, 0, 0, 2)))
    console.print()


def _is_numeric(column: TableColumn) -> bool:
    return all(cell.value is not None or cell.text == MISSING for cell in column.cells)
