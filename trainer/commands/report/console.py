"""The report on the console."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainer.commands.report.summary import Report
from trainer.commands.report.table import MISSING, TableColumn, columns

MAX_UNFINISHED = 10  # that are named
GAP = 3  # between columns, of which the box has one


def show(report: Report, console: Console) -> None:
    """Prints the table, and what became of the runs that did not finish."""
    console.print(Text(f"{_counted(report)}, best {report.score} first, ± deviation over seeds"))
    found = columns(report)
    if table := fitting_table(found, console.width):
        console.print(table)
    else:
        _show_one_by_one(report, found, console)
    unfinished = [record for record in report.records if not record.has_finished]
    for record in unfinished[:MAX_UNFINISHED]:
        error = str(record.state.get("error", "")).partition("\n")[0]
        console.print(Text(f"{record.folder}: {record.status_text}{': ' if error else ''}{error}"), soft_wrap=True)
    if len(unfinished) > MAX_UNFINISHED:
        console.print(f"and {len(unfinished) - MAX_UNFINISHED} more that are not finished: --csv FILE names all")


def _counted(report: Report) -> str:
    runs, configurations = len(report.records), len(report.configurations)
    return f"{runs} run{'s' * (runs != 1)} of {configurations} configuration{'s' * (configurations != 1)}"


def fitting_table(found: Sequence[TableColumn], width: int) -> Table | None:
    """The table in at most so many characters a line, without a word broken; None if that cannot be."""
    least = [_least_width(column) for column in found]
    left = width - sum(least) - GAP * (len(found) - 1)
    if left < 0:
        return None
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for column, narrow in zip(found, least, strict=True):
        wide = min(_width([column.heading, *(cell.text for cell in column.cells)]), narrow + left)
        left -= wide - narrow
        table.add_column(Text(column.heading), width=wide, justify="right" if _is_of_numbers(column) else "left")
    for row in zip(*(column.cells for column in found), strict=True):
        table.add_row(*(Text(cell.text.strip()) for cell in row))  # a space in front would break the word after it
    return table


def _show_one_by_one(report: Report, found: Sequence[TableColumn], console: Console) -> None:
    """Two paragraphs a configuration, for a narrow console or many settings."""
    for row, configuration in enumerate(report.configurations):
        console.print(Text(f"\n{configuration.label}", style="bold"))
        figures = [(column.heading, column.cells[row].text) for column in found if not column.is_setting]
        said = "; ".join(f"{heading} {text}" for heading, text in figures if text not in ("", MISSING))
        console.print(Padding(Text(said), (0, 0, 0, 2)))
    console.print()


def _least_width(column: TableColumn) -> int:
    """The longest word, or of numbers the longest cell: they are not broken between mean and deviation."""
    cells = [cell.text for cell in column.cells]
    words = cells if _is_of_numbers(column) else [word for cell in cells for word in cell.split()]
    return _width([*column.heading.split(), *words])


def _width(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _is_of_numbers(column: TableColumn) -> bool:
    return all(cell.value is not None or cell.text == MISSING for cell in column.cells)
