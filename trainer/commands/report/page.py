"""The report as one HTML page, which needs no network. plotly.js draws the plots."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from trainer.commands.report.plot_data import AXES, curves, drawn_names, heat_maps, last_of_clients
from trainer.commands.report.run_records import RunRecord
from trainer.commands.report.summary import Configuration, Report
from trainer.commands.report.table import Cell, columns, number_cell

PACKAGE_DIR = Path(__file__).parent
GENERATOR = '<meta name="generator" content="silotrain report">'  # marks a file as a report


def page(report: Report, folder: Path) -> str:
    """Return the page. Its links to the runs are relative to `folder`."""
    runs, configurations = len(report.records), len(report.configurations)
    return Template((PACKAGE_DIR / "page.html").read_text(encoding="utf-8")).substitute(
        generator=GENERATOR,
        title=f"{runs} runs, {configurations} configurations" if runs > 1 else escape(report.records[0].folder.name),
        style=(PACKAGE_DIR / "page.css").read_text(encoding="utf-8"),
        score=escape(report.score),
        table=_configurations(report),
        runs=_runs(report, folder),
        open=" open" * (runs == 1),
        data=json.dumps(_plot_data(report), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        script=(PACKAGE_DIR / "page.js").read_text(encoding="utf-8"),
    )


def _plot_data(report: Report) -> dict[str, object]:
    """Return the data of the page's script."""
    names = drawn_names(report)
    client_metrics = {metric.name for record in report.records for metric in record.clients}
    return {
        "axes": AXES,
        "names": names,
        "figures": sorted(client_metrics, reverse=True),  # test_ first
        "configurations": [
            {"label": group.label, "curves": curves(group, names), "clients": last_of_clients(group.counted)}
            for group in report.configurations
        ],
        "heatMaps": heat_maps(report),
    }


def _configurations(report: Report) -> str:
    table_columns = columns(report)
    head = [column.heading for column in table_columns]
    rows = zip(*(column.cells for column in table_columns), strict=True)
    swatch = Cell("")
    return _table("configurations", ["", *head], ([swatch, *row] for row in rows))


def _runs(report: Report, folder: Path) -> str:
    head = ("run", "configuration", "seed", "status", report.score, "error")
    rows = (_run(group, record, report.score) for group in report.configurations for record in group.records)
    links = {str(record.folder): os.path.relpath(record.folder, folder) for record in report.records}
    return _table("runs", head, rows, links)


def _run(configuration: Configuration, record: RunRecord, score: str) -> list[Cell]:
    return [
        Cell(str(record.folder)),
        Cell(configuration.label),
        Cell(str(record.seed), record.seed),
        Cell(record.status_text),
        number_cell(record.metrics.get(score)),
        Cell(str(record.state.get("error", "")).partition("\n")[0]),
    ]


def _table(name: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], links: dict[str, str] | None = None) -> str:
    headings = "".join(f"<th>{escape(heading)}</th>" for heading in head)
    body = "\n".join(f"<tr>{''.join(_data(cell, links or {}) for cell in row)}</tr>" for row in rows)
    return f'<table id="{name}">\n<thead><tr>{headings}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _data(cell: Cell, links: dict[str, str]) -> str:
    text = escape(cell.text)
    if cell.text in links:
        text = f'<a href="{escape(links[cell.text])}/">{text}</a>'
    return f"<td>{text}</td>" if cell.value is None else f'<td class="number" data-value="{cell.value!r}">{text}</td>'
