"""Output files of a report: CSV files, and how files are written. Only such reports are overwritten."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from trainer.checkpoint.files import write_file
from trainer.commands.report.page import AXES, drawn_names
from trainer.commands.report.settings import title
from trainer.commands.report.summary import Configuration, Report
from trainer.utils.text import harmless_cell

SEARCH_LENGTH = 8192  # bytes at the beginning and at the end of a file, where PDF has its metadata

# First columns of the CSV files.
RUN = ("run", "configuration", "status", "seed")
ROUND = ("run", "configuration", "seed", *AXES)
CONFIGURATION = ("configuration", "seeds", "runs", "unfinished")


@dataclass(frozen=True)
class OutputFile:
    """A file to write.

    Attributes:
        option: its name on the command line.
        path: where it is written.
        mark: text near the beginning, or the end, of each such report.
        content: text or bytes.
    """

    option: str
    path: Path
    mark: str
    content: str | bytes

    def write_error(self) -> str:
        """Return why it cannot be written; empty if it can."""
        if self.path.is_dir():
            return f"{self.option} {self.path} is a folder.\n  name a file"
        if not self.path.parent.is_dir():
            return f"{self.option} {self.path}: no such folder: {self.path.parent}.\n  create it, or name another file"
        if self.path.exists() and not self._is_report():
            return f"{self.option} {self.path} exists and is not such a report.\n  name another file"
        return ""

    def _is_report(self) -> bool:
        with open(self.path, "rb") as file:
            ends = [file.read(SEARCH_LENGTH)]
            file.seek(-min(SEARCH_LENGTH, self.path.stat().st_size), os.SEEK_END)
            ends.append(file.read())
        return any(self.mark.encode() in end for end in ends)


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
            write_file(file.path, file.content)
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


def summary_csv(report: Report) -> str:
    """Return a row for each configuration: differing settings, and mean and deviation of each metric over its seeds.

    The deviation is that of the sample, and empty for a single run.
    """
    names = list(dict.fromkeys(name for record in report.records for name in record.metrics))
    head = [*CONFIGURATION, *map(title, report.columns)]
    head += [heading for name in names for heading in (f"{name} mean", f"{name} std")]
    return _csv_text(head, (_summary_row(group, names) for group in report.configurations))


def _summary_row(group: Configuration, names: Sequence[str]) -> list[object]:
    counted = group.counted
    row: list[object] = [group.label, len({record.seed for record in counted}), len(counted), group.status_text]
    row += group.cells
    for name in names:
        spread = group.spread(name)
        row += [spread.mean, spread.deviation if math.isfinite(spread.deviation) else ""] if spread.runs else ["", ""]
    return row


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
    writer.writerows([harmless_cell(cell) for cell in row] for row in (head, *rows))
    return text.getvalue()
