"""The report on the console."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from trainer.commands.report.summary import Report
from trainer.commands.report.table import MISSING, TableColumn, columns
from trainer.utils.tables import COLUMN_GAP, make_table

MAX_UNFINISHED = 10  # listed runs


def show(report: Report, console: Console) -> None:
    """Print the table, and the status of the runs that have not finished."""
    console.print(Text(f"{_counts(report)}, best {report.score} first, ± deviation over seeds"))
    table_columns = columns(report)
    if table := fitting_table(table_columns, console.width):
        console.print(table)
    else:
        _show_paragraphs(report, table_columns, console)
    unfinished = [record for record in report.records if not record.has_finished]
    for record in unfinished[:MAX_UNFINISHED]:
        error = str(record.state.get("error", "")).partition("\n")[0]
        console.print(Text(f"{record.folder}: {record.status_text}{': ' if error else ''}{error}"), soft_wrap=True)
    if len(unfinished) > MAX_UNFINISHED:
        console.print(f"and {len(unfinished) - MAX_UNFINISHED} more unfinished runs: --csv FILE lists all")


def _counts(report: Report) -> str:
    runs, configurations = len(report.records), len(report.configurations)
    return f"{runs} run{'s' * (runs != 1)} of {configurations} configuration{'s' * (configurations != 1)}"


def fitting_table(columns: Sequence[TableColumn], width: int) -> Table | None:
    """Return the table in lines of at most `width` characters, without broken words.

    None if that is impossible.
    """
    minima = [_min_width(column) for column in columns]
    left = width - sum(minima) - COLUMN_GAP * (len(columns) - 1)
    if left < 0:
        return None
    sized = []
    for column, minimum in zip(columns, minima, strict=True):
        column_width = min(_width([column.heading, *(cell.text for cell in column.cells)]), minimum + left)
        left -= column_width - minimum
        justify = "right" if _is_numeric(column) else "left"
        sized.append(Column(Text(column.heading), width=column_width, justify=justify))
    # A leading space would break the word after it.
    rows = zip(*([cell.text.strip() for cell in column.cells] for column in columns), strict=True)
    return make_table(sized, rows)


def _show_paragraphs(report: Report, columns: Sequence[TableColumn], console: Console) -> None:
    """Print paragraphs instead, for a narrow console or many settings."""
    for row, configuration in enumerate(report.configurations):
        console.print(Text(f"\n{configuration.label}", style="bold"))
        metrics = [(column.heading, column.cells[row].text) for column in columns if not column.is_setting]
        paragraph = "; ".join(f"{heading} {text}" for heading, text in metrics if text not in ("", MISSING))
        console.print(Padding(Text(paragraph), (0, 0, 0, 2)))
    console.print()


def _min_width(column: TableColumn) -> int:
    """Return the width of the longest word.

    For numbers, of the longest cell: mean and deviation stay on one line.
    """
    cells = [cell.text for cell in column.cells]
    words = cells if _is_numeric(column) else [word for cell in cells for word in cell.split()]
    return _width([*column.heading.split(), *words])


def _width(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _is_numeric(column: TableColumn) -> bool:
    return all(cell.value is not None or cell.text == MISSING for cell in column.cells)
