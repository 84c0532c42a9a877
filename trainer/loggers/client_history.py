"""Evaluation metrics of single clients, collected over the rounds of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from trainer.loggers.base import higher_is_better

EVALUATIONS = ("test_", "global_", "personal_")  # prefixes; the other metrics of clients describe their training

MetricColumn = tuple[np.ndarray, np.ndarray]  # clients, int64 [N], and their values, float64 [N]


class ClientMetric(NamedTuple):
    """One metric of all clients over a run.

    name: the metric without its client, such as `test_accuracy`.
    clients: client numbers, ascending.
    rounds: the rounds in which the metric was measured, ascending.
    values: float64 [clients, rounds], NaN where a value is missing or not finite.
    """

    name: str
    clients: list[int]
    rounds: list[int]
    values: np.ndarray

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.name)


def client_metrics(history: Iterable[Mapping[str, Any]]) -> list[ClientMetric]:
    """Collect the evaluation metrics of clients from the metrics of a run's rounds.

    Args:
        history: the metrics of each round, in order; a value may be None.

    Returns:
        The metrics that have at least one finite value, sorted by name. Each has a row for every client that occurs in
        the history, including clients without test examples.
    """
    known: set[int] = set()
    columns: dict[str, dict[int, MetricColumn]] = defaultdict(dict)
    for metrics in history:
        for name, values in _by_name(metrics).items():
            known.update(values)
            if name.startswith(EVALUATIONS):
                columns[name][metrics["round"]] = _column(values)
    collected = (_client_metric(name, sorted(known), columns[name]) for name in sorted(columns))
    return [metric for metric in collected if not np.isnan(metric.values).all()]


def _by_name(metrics: Mapping[str, Any]) -> dict[str, dict[int, float | None]]:
    """Group the values of one round by the metric's name, then by the client's number."""
    names: dict[str, dict[int, float | None]] = defaultdict(dict)
    for key, value in metrics.items():
        if key.startswith("client/"):
            _, client, name = key.split("/")
            names[name][int(client)] = value
    return names


def _column(values: Mapping[int, float | None]) -> MetricColumn:
    return np.array(list(values)), np.array(list(values.values()), dtype=np.float64)


def _client_metric(name: str, clients: list[int], columns: Mapping[int, MetricColumn]) -> ClientMetric:
    values = np.full((len(clients), len(columns)), np.nan)
    for index, (measured, column) in enumerate(columns.values()):
        values[np.searchsorted(clients, measured), index] = column
    values[~np.isfinite(values)] = np.nan
    return ClientMetric(name, clients, list(columns), values)
