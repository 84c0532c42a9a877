"""What the metrics of a run say of single clients, put together over its rounds.

Imports numpy at its top: import this module when a run has finished.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from trainer.utils.metric_direction import higher_is_better

EVALUATIONS = ("test_", "global_", "personal_")  # what else is said of a client is of its training

MetricColumn = tuple[np.ndarray, np.ndarray]  # of one round: who was measured, int64 [N], and the values, float64 [N]


class Worst(NamedTuple):
    """The worst client when clients were measured last. row: its index. ties: how many others are as bad."""

    row: int
    round: int
    value: float
    ties: int


class ClientMetric(NamedTuple):
    """One figure of every client through a run.

    name: as in the metrics, such as `test_accuracy`. clients, rounds: their numbers, ascending; of the rounds, those
    in which the figure was measured. values: float64 [clients, rounds], NaN where it was not, or was not finite.
    """

    name: str
    clients: list[int]
    rounds: list[int]
    values: np.ndarray

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.name)

    def worst(self) -> Worst:
        """The worst client of the last round that has values; of equal ones, that with the lowest number."""
        column = np.flatnonzero(~np.isnan(self.values).all(0))[-1]
        values = self.values[:, column]
        row = int(np.nanargmin(values) if self.higher_is_better else np.nanargmax(values))
        return Worst(row, self.rounds[column], values[row], int((values == values[row]).sum()) - 1)


def client_metrics(history: Iterable[Mapping[str, Any]]) -> list[ClientMetric]:
    """The figures of evaluations that have any value at all, by name, from the metrics of a run's rounds in order.

    Every client of which the metrics speak has a row, also one without test examples. A value may be None.
    """
    known: set[int] = set()
    columns: dict[str, dict[int, MetricColumn]] = defaultdict(dict)
    for metrics in history:
        for name, values in _by_name(metrics).items():
            known.update(values)
            if name.startswith(EVALUATIONS):
                columns[name][metrics["round"]] = _column(values)
    figures = (_metric(name, sorted(known), columns[name]) for name in sorted(columns))
    return [figure for figure in figures if not np.isnan(figure.values).all()]


def _by_name(metrics: Mapping[str, Any]) -> dict[str, dict[int, float | None]]:
    """The values of one round by the figure's name and the client's number."""
    names: dict[str, dict[int, float | None]] = defaultdict(dict)
    for key, value in metrics.items():
        if key.startswith("client/"):
            _, client, name = key.split("/")
            names[name][int(client)] = value
    return names


def _column(values: Mapping[int, float | None]) -> MetricColumn:
    return np.array(list(values)), np.array(list(values.values()), dtype=np.float64)


def _metric(name: str, clients: list[int], columns: Mapping[int, MetricColumn]) -> ClientMetric:
    values = np.full((len(clients), len(columns)), np.nan)
    for index, (measured, column) in enumerate(columns.values()):
        values[np.searchsorted(clients, measured), index] = column
    values[~np.isfinite(values)] = np.nan
    return ClientMetric(name, clients, list(columns), values)
