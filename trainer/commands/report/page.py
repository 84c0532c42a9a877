"""The report as one HTML page, which needs no network. plotly.js draws the plots."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
from plotly.offline import get_plotlyjs

from trainer.commands.report.run_records import ClientMetric, RunRecord
from trainer.commands.report.summary import Configuration, Report, spread_of
from trainer.commands.report.table import Cell, columns, number_cell
from trainer.loggers import HEADLINES, Metrics, higher_is_better

PACKAGE_DIR = Path(__file__).parent
GENERATOR = '<meta name="generator" content="silotrain report">'  # marks a file as a report

AXES = {
    "round": "round",
    "examples": "examples seen",
    "seconds": "seconds",
    "bytes_between_silos": "bytes between silos",
}
STEP_AXES = {"step": "step"}
GROUPS = ("test/", "train/", "validation/", "global/", "personal/", "ema/", "clients/", "delta/", "system/")
COUNTS = ("clients/trained", "clients/nonfinite", "clients/stragglers")
SCORES = [name for name in HEADLINES if name != "loss"]
FIRST = (
    *(f"test/{name}" for name in SCORES),
    *("train/loss", "test/loss"),
    *(f"clients/worst_{name}" for name in SCORES),
    *(f"validation/{name}" for name in SCORES),
)

MAX_CELLS = 500_000  # of all heat maps of a page, so that it opens quickly
SIGNIFICANT_DIGITS = 7

PlotData = dict[str, Any]  # JSON for the page's script


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
        "axes": AXES | STEP_AXES,
        "names": names,
        "stepNames": (step_names := drawn_step_names(report)),
        "figures": sorted(client_metrics, reverse=True),  # test_ first
        "configurations": [
            {
                "label": group.label,
                "curves": curves(group, names),
                "steps": step_curves(group, step_names),
                "clients": last_of_clients(group.counted),
            }
            for group in report.configurations
        ],
        "heatMaps": heat_maps(report),
    }


def _configurations(report: Report) -> str:
    table_columns = columns(report)
    swatches = [Cell("")] * len(report.configurations)
    rows = zip(swatches, *(column.cells for column in table_columns), strict=True)
    return _table("configurations", ["", *(column.heading for column in table_columns)], rows, {})


def _runs(report: Report, folder: Path) -> str:
    rows = [
        [
            Cell(str(record.folder)),
            Cell(group.label),
            Cell(str(record.seed), record.seed),
            Cell(record.status_text),
            number_cell(record.metrics.get(report.score)),
            Cell(record.error),
        ]
        for group in report.configurations
        for record in group.records
    ]
    links = {str(record.folder): _link(os.path.relpath(record.folder, folder)) for record in report.records}
    return _table("runs", ("run", "configuration", "seed", "status", report.score, "error"), rows, links)


def _link(path: str) -> str:
    """Return the address of a folder: without its colons quoted, a browser might take it for a script."""
    return f"{quote(os.fsencode(path))}/"


def _table(name: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], links: Mapping[str, str]) -> str:
    headings = "".join(f"<th>{escape(heading)}</th>" for heading in head)
    body = "\n".join(f"<tr>{''.join(_data(cell, links.get(cell.text)) for cell in row)}</tr>" for row in rows)
    return f'<table id="{name}">\n<thead><tr>{headings}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _data(cell: Cell, link: str | None) -> str:
    text = f'<a href="{escape(link)}">{escape(cell.text)}</a>' if link else escape(cell.text)
    return f"<td>{text}</td>" if cell.value is None else f'<td class="number" data-value="{cell.value!r}">{text}</td>'


def drawn_names(report: Report) -> list[str]:
    """Return the metrics that are drawn as curves, the score and the usual ones first."""
    found = dict.fromkeys(name for record in report.records for metrics in record.rounds for name in metrics)
    names = [name for name in found if name.startswith(GROUPS) and name not in COUNTS]
    first = [name for name in (report.score, *FIRST) if name in names]
    return list(dict.fromkeys([*first, *(name for group in GROUPS for name in names if name.startswith(group))]))


def drawn_step_names(report: Report) -> list[str]:
    """Return the metrics of single steps."""
    found = dict.fromkeys(name for record in report.records for metrics in record.steps for name in metrics)
    return [name for name in found if name not in ("round", "step")]


def curves(configuration: Configuration, names: Sequence[str]) -> PlotData:
    """Return the curves of a configuration by round: `x` by axis, and each metric's spread.

    The x of a round is the mean over the counted runs that got so far. None stands for not measured, not finite, and
    for the deviation of a single run.
    """
    return _curves((metrics for record in configuration.counted for metrics in record.rounds), "round", AXES, names)


def step_curves(configuration: Configuration, names: Sequence[str]) -> PlotData:
    """Return the curves of a configuration by step, as `curves` those by round."""
    return _curves((metrics for record in configuration.counted for metrics in record.steps), "step", STEP_AXES, names)


def _curves(history: Iterable[Metrics], key: str, axes: Iterable[str], names: Sequence[str]) -> PlotData:
    by_place: dict[int, list[Metrics]] = {}
    for metrics in history:
        by_place.setdefault(int(metrics[key]), []).append(metrics)
    rounds = [by_place[place] for place in sorted(by_place)]
    x = {axis: [_plain(fmean(metrics[axis] for metrics in same)) for same in rounds] for axis in axes}
    figures = {}
    for name in names:
        spreads = [spread_of([metrics[name] for metrics in same if name in metrics]) for same in rounds]
        if any(spread.runs for spread in spreads):
            figures[name] = {
                "mean": [_plain(spread.mean) for spread in spreads],
                "deviation": [_plain(spread.deviation) for spread in spreads],
                "runs": [spread.runs for spread in spreads],
            }
    return {"x": x, "figures": figures}


def last_of_clients(records: Iterable[RunRecord]) -> PlotData:
    """Return, by metric, the latest value of each client of each run, and its name."""
    drawn: PlotData = {}
    for record in records:
        for metric in record.clients:
            points = drawn.setdefault(metric.name, {"values": [], "names": []})
            for client, value in zip(metric.clients, metric.values[:, -1].tolist(), strict=True):
                if math.isfinite(value):
                    points["values"].append(_plain(value))
                    points["names"].append(f"client {client}, seed {record.seed}")
    return drawn


def heat_maps(report: Report) -> list[PlotData]:
    """Return heat maps [clients, rounds] of the metrics of single clients, by run.

    So that a large page opens, of long runs only every second round is drawn, or every third, and always the last.
    """
    measured = [(group, record) for group in report.configurations for record in group.records if record.clients]
    max_cells = MAX_CELLS // max(1, sum(len(record.clients) for _, record in measured))
    return [
        {
            "name": f"{configuration.label}, seed {record.seed}",
            "figures": {metric.name: _heat_map(metric, max_cells) for metric in record.clients},
        }
        for configuration, record in measured
    ]


def _heat_map(metric: ClientMetric, max_cells: int) -> PlotData:
    stride = -(-metric.values.size // max_cells)
    kept = np.arange(len(metric.rounds))[::-1][::stride][::-1]
    return {
        "clients": metric.clients,
        "rounds": [metric.rounds[index] for index in kept],
        "values": [[_plain(value) for value in row] for row in metric.values[:, kept].tolist()],
        "best": "high" if higher_is_better(metric.name) else "low",
    }


def _plain(value: float) -> float | None:
    """Return the value for JSON, rounded; None if it is not finite."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
