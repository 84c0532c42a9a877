"""Evaluation metrics of single clients, collected over the rounds of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

EVALUATIONS = ("test_", "global_", "personal_")  # prefixes; the other metrics of clients describe their training


class ClientMetric(NamedTuple):
    """One metric of all clients over a run.

    Attributes:
        name: the metric without its client, such as `test_accuracy`.
        clients: client numbers, ascending.
        rounds: the rounds in which the metric was measured, ascending.
        values: float64 [clients, rounds], NaN where a value is missing or not finite.
    """

    name: str
    clients: list[int]
    rounds: list[int]
    values: np.ndarray


def client_metrics(history: Sequence[Mapping[str, Any]]) -> list[ClientMetric]:
    """Collect the evaluation metrics of clients from the metrics of a run's rounds.

    Args:
        history: the metrics of each round, in order; a value may be None.

    Returns:
        The metrics that have at least one finite value, sorted by name. Each has a row for every client that occurs in
        the history, including clients without test examples.
    """
    keys = {tuple(key.split("/")) for metrics in history for key in metrics if key.startswith("client/")}
    clients = sorted({int(client) for _, client, _ in keys})
    collected = []
    for name in sorted({name for _, _, name in keys if name.startswith(EVALUATIONS)}):
        rows = [f"client/{client}/{name}" for client in clients]
        measured = [metrics for metrics in history if any(key in metrics for key in rows)]
        values = np.array([[metrics.get(key) for metrics in measured] for key in rows], np.float64)  # None becomes NaN
        values[~np.isfinite(values)] = np.nan
        if not np.isnan(values).all():
            collected.append(ClientMetric(name, clients, [metrics["round"] for metrics in measured], values))
    return collected
