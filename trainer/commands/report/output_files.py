"""Output files of a report: CSV files, and how files are written. Only such reports are overwritten."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from trainer.checkpoint.files import write_text
from trainer.commands.report.page import AXES, drawn_names
from trainer.commands.report.settings import title
from trainer.commands.report.summary import Report
from trainer.utils.text import is_number

SEARCH_LENGTH = 1000  # characters
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")  # at the beginning of a cell

# First columns of the CSV files.
RUN = ("run", "configuration", "status", "seed")
ROUND = ("run", "configuration", "seed", *AXES)


@dataclass(frozen=True)
class OutputFile:
    """A file to write.

    Attributes:
        option: its name on the command line.
        path: where it is written.
        mark: text near the beginning of each such report.
        text: its content.
    """

    option: str
    path: Path
    mark: str
    text: str

    def write_error(self) -> str:
        """Return why it cannot be written; empty if it can."""
        if self.path.is_dir():
            return f"{self.option} {self.path} is a folder.\n  name a file"
        if not self.path.parent.is_dir():
            return f"{self.option} {self.path}: no such folder: {self.path.parent}.\n  create it, or name another file"
        if self.path.exists() and self.mark not in self.path.read_text(errors="replace")[:SEARCH_LENGTH]:
            return f"{self.option} {self.path} exists and is not such a report.\n  name another file"
        return ""


def write_all(files: Iterable[OutputFile]) -> None:
    """Replace the files, each atomically.

    Raises:
        ValueError: all the reasons why they cannot be written; none of them was.
    """
    files = list(files)
    if errors := [error for file in files if (error := file.write_error())]:
        raise ValueError("\n".join(errors))
    for file in files:
        try:
            write_text(file.path, file.text)
        except OSError as error:
            reason = f"{file.option} {file.path} cannot be written: {error.strerror}"
            raise ValueError(f"{reason}\n  name another file with {file.option}") from error


def runs_csv(report: Report) -> str:
    """Return a row for each run: folder, status, seed, differing settings, metrics.

    The metrics are those of result.json; for an unfinished run, the latest that it logged.
    """
    names = list(dict.fromkeys(name for record in report.records for name in record.metrics))
    rows = (
        [record.folder, group.label, record.status, record.seed, *group.cells, *map(record.metrics.get, names)]
        for group in report.configurations
        for record in group.records
    )
    return _csv_text([*RUN, *map(title, report.columns), *names], rows)


def curves_csv(report: Report) -> str:
    """Return a row for each round of each run, with the metrics that the page draws."""
    names = drawn_names(report)
    rows = (
        [record.folder, group.label, record.seed, *map(metrics.get, (*AXES, *names))]
        for group in report.configurations
        for record in group.records
        for metrics in record.rounds
    )
    return _csv_text([*ROUND, *names], rows)


def _csv_text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_harmless(cell) for cell in row] for row in (head, *rows))
    return text.getvalue()


def _harmless(cell: object) -> object:
    """Return a cell that a spreadsheet does not take for a formula: a text that begins like one, with an apostrophe."""
    text = str(cell)
    return f"'{text}" if text.startswith(FORMULA_SIGNS) and not is_number(text) else cell
