"""What a report draws: figures by round with their spread over seeds, and figures by client."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from trainer.commands.report.run_records import RunRecord
from trainer.commands.report.summary import Configuration, Report, spread_of
from trainer.loggers import HEADLINES, Metrics
from trainer.loggers.client_history import ClientMetric

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

MAX_CELLS = 500_000  # of all heat maps of a page: with more it takes long to open
SIGNIFICANT_DIGITS = 7

Drawn = dict[str, Any]  # of plain values, for the page's script


def drawn_names(report: Report) -> list[str]:
    """The figures that have curves: the score and the usual ones first."""
    found = dict.fromkeys(name for record in report.records for metrics in record.rounds for name in metrics)
    names = [name for name in found if name.startswith(GROUPS) and name not in COUNTS]
    first = [name for name in (report.score, *FIRST) if name in names]
    groups = sorted(names, key=lambda name: next(place for place, group in enumerate(GROUPS) if name.startswith(group)))
    return list(dict.fromkeys([*first, *groups]))


def curves(configuration: Configuration, names: Sequence[str]) -> Drawn:
    """The lines of a configuration: `x` by axis, and of each figure mean, deviation and number of runs; all by round.

    A round's place on an axis is the mean over the runs that count and came so far. None: not measured, not finite,
    or for a deviation, of one run.
    """
    by_round: dict[int, list[Metrics]] = {}
    for record in configuration.counted:
        for metrics in record.rounds:
            by_round.setdefault(int(metrics["round"]), []).append(metrics)
    rounds = [by_round[index] for index in sorted(by_round)]
    x = {axis: [_plain(fmean(metrics[axis] for metrics in same)) for same in rounds] for axis in AXES}
    measured = {name: _figure(name, rounds) for name in names}
    return {"x": x, "figures": {name: drawn for name, drawn in measured.items() if any(drawn["runs"])}}


def _figure(name: str, rounds: Iterable[Sequence[Metrics]]) -> Drawn:
    spreads = [spread_of([metrics[name] for metrics in same if name in metrics]) for same in rounds]
    return {
        "mean": [_plain(spread.mean) for spread in spreads],
        "deviation": [_plain(spread.deviation) for spread in spreads],
        "runs": [spread.runs for spread in spreads],
    }


def last_of_clients(records: Iterable[RunRecord]) -> Drawn:
    """By figure: the value of every client of every run when clients were measured last, and which it is."""
    drawn: Drawn = {}
    for record in records:
        for figure in record.clients:
            points = drawn.setdefault(figure.name, {"values": [], "names": []})
            for client, value in zip(figure.clients, figure.values[:, -1].tolist(), strict=True):
                if math.isfinite(value):
                    points["values"].append(_plain(value))
                    points["names"].append(f"client {client}, seed {record.seed}")
    return drawn


def heat_maps(report: Report) -> list[Drawn]:
    """Of every run that measured clients: its name and by figure clients, rounds and values [clients, rounds].

    So that a page of many runs opens, of long ones every second round is drawn, or every third, and the last.
    """
    measured = [(each, record) for each in report.configurations for record in each.records if record.clients]
    most = MAX_CELLS // max(1, sum(len(record.clients) for _, record in measured))
    return [
        {
            "name": f"{configuration.label}, seed {record.seed}",
            "figures": {figure.name: _heat_map(figure, most) for figure in record.clients},
        }
        for configuration, record in measured
    ]


def _heat_map(metric: ClientMetric, most: int) -> Drawn:
    stride = -(-metric.values.size // most)
    kept = np.arange(len(metric.rounds))[::-1][::stride][::-1]
    return {
        "clients": metric.clients,
        "rounds": [metric.rounds[index] for index in kept],
        "values": [[_plain(value) for value in row] for row in metric.values[:, kept].tolist()],
        "best": "high" if metric.higher_is_better else "low",
    }


def _plain(value: float) -> float | None:
    """The value as JSON has it, in as many digits as one can see."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
