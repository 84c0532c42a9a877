"""The report as one HTML page that needs no network: table, curves and pictures of clients, drawn by plotly.js."""

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
GENERATOR = '<meta name="generator" content="silotrain report">'  # by which a page of ours is known


def page(report: Report, folder: Path) -> str:
    """The page, to be written to `folder`: its links to the runs are relative to it."""
    runs, configurations = len(report.records), len(report.configurations)
    return Template((PACKAGE_DIR / "page.html").read_text(encoding="utf-8")).substitute(
        generator=GENERATOR,
        title=f"{runs} runs, {configurations} configurations" if runs > 1 else escape(report.records[0].folder.name),
        style=(PACKAGE_DIR / "page.css").read_text(encoding="utf-8"),
        score=escape(report.score),
        table=_configurations(report),
        runs=_runs(report, folder),
        open=" open" * (runs == 1),
        data=json.dumps(_drawn(report), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        script=(PACKAGE_DIR / "page.js").read_text(encoding="utf-8"),
    )


def _drawn(report: Report) -> dict[str, object]:
    """What the page's script draws."""
    names = drawn_names(report)
    figures = {figure.name for record in report.records for figure in record.clients}
    return {
        "axes": AXES,
        "names": names,
        "figures": sorted(figures, reverse=True),  # so test_ is first
        "configurations": [
            {"label": each.label, "curves": curves(each, names), "clients": last_of_clients(each.counted)}
            for each in report.configurations
        ],
        "heatMaps": heat_maps(report),
    }


def _configurations(report: Report) -> str:
    found = columns(report)
    head, rows = [column.heading for column in found], zip(*(column.cells for column in found), strict=True)
    swatch = Cell("")
    return _table("configurations", ["", *head], ([swatch, *row] for row in rows))


def _runs(report: Report, folder: Path) -> str:
    head = ("run", "configuration", "seed", "status", report.score, "error")
    rows = (_run(each, record, report.score) for each in report.configurations for record in each.records)
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
