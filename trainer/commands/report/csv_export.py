"""CSV files of a report: a row for each run, and a row for each round of it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import StringIO

from trainer.commands.report.plot_data import AXES, drawn_names
from trainer.commands.report.settings import title
from trainer.commands.report.summary import Report

RUN = ("run", "configuration", "status", "seed")
ROUND = ("run", "configuration", "seed", *AXES)


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
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
