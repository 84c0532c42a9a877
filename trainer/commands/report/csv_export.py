"""The report as CSV: one row a run, and one row a run and round."""

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
    """One row a run, the best configuration first: its folder, status, seed, differing settings and all its figures.

    The figures are those of result.json, or of an unfinished run the last that it measured.
    """
    figures = list(dict.fromkeys(name for record in report.records for name in record.metrics))
    rows = (
        [record.folder, each.label, record.status, record.seed, *each.cells, *map(record.metrics.get, figures)]
        for each in report.configurations
        for record in each.records
    )
    return _written([*RUN, *map(title, report.columns), *figures], rows)


def curves_csv(report: Report) -> str:
    """One row a run and round, with what the page draws, unrounded and not yet averaged over seeds."""
    names = drawn_names(report)
    rows = (
        [record.folder, each.label, record.seed, *map(metrics.get, (*AXES, *names))]
        for each in report.configurations
        for record in each.records
        for metrics in record.rounds
    )
    return _written([*ROUND, *names], rows)


def _written(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
