"""Data of the page's plots: metrics by round over seeds, and metrics by client."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from trainer.commands.report.client_metrics import ClientMetric
from trainer.commands.report.run_records import RunRecord
from trainer.commands.report.summary import Configuration, Report, spread_of
from trainer.loggers import HEADLINES, Metrics, higher_is_better

AXES = {
    "round": "round",
    "examples": "examples seen",
    "seconds": "seconds",
    "bytes_between_silos": "bytes between silos",
}
GROUPS = ("test/", "train/", "validation/", "global/", "personal/", "ema/", "clients/", "delta/")
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


def drawn_names(report: Report) -> list[str]:
    """Return the metrics that are drawn as curves, the score and the usual ones first."""
    found = dict.fromkeys(name for record in report.records for metrics in record.rounds for name in metrics)
    names = [name for name in found if name.startswith(GROUPS) and name not in COUNTS]
    first = [name for name in (report.score, *FIRST) if name in names]
    groups = sorted(names, key=lambda name: next(place for place, group in enumerate(GROUPS) if name.startswith(group)))
    return list(dict.fromkeys([*first, *groups]))


def curves(configuration: Configuration, names: Sequence[str]) -> PlotData:
    """Return the curves of a configuration: `x` by axis, and each metric's spread.

    The x of a round is the mean over the counted runs that got so far. None stands for not measured, not finite, and
    for the deviation of a single run.
    """
    by_round: dict[int, list[Metrics]] = {}
    for record in configuration.counted:
        for metrics in record.rounds:
            by_round.setdefault(int(metrics["round"]), []).append(metrics)
    rounds = [by_round[index] for index in sorted(by_round)]
    x = {axis: [_plain(fmean(metrics[axis] for metrics in same)) for same in rounds] for axis in AXES}
    measured = {name: _line(name, rounds) for name in names}
    return {"x": x, "figures": {name: drawn for name, drawn in measured.items() if any(drawn["runs"])}}


def _line(name: str, rounds: Iterable[Sequence[Metrics]]) -> PlotData:
    spreads = [spread_of([metrics[name] for metrics in same if name in metrics]) for same in rounds]
    return {
        "mean": [_plain(spread.mean) for spread in spreads],
        "deviation": [_plain(spread.deviation) for spread in spreads],
        "runs": [spread.runs for spread in spreads],
    }


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
