"""Evaluation metrics of single clients over a run."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.commands.report.run_records import client_metrics

names = st.sampled_from(["test_accuracy", "personal_accuracy", "global_loss", "train_loss", "delta_norm"])
client_keys = st.tuples(st.integers(0, 12), names)
values = st.none() | st.integers() | st.floats()
histories = st.lists(st.dictionaries(client_keys, values), max_size=6)


@settings(deadline=None, max_examples=80)
@given(histories)
def test_evaluations_are_collected_with_all_finite_values(
    rounds: list[dict[tuple[int, str], float | None]],
) -> None:
    """Exactly the finite values of evaluations are found; metrics of training are left out."""
    history = [
        {"round": 2 * index, "test/accuracy": 0.5}
        | {f"client/{client}/{name}": v for (client, name), v in each.items()}
        for index, each in enumerate(rounds)
    ]
    expected = {
        (name, client, 2 * index): float(value)
        for index, each in enumerate(rounds)
        for (client, name), value in each.items()
        if name not in ("train_loss", "delta_norm") and value is not None and math.isfinite(value)
    }
    collected = client_metrics(history)
    found = {
        (metric.name, metric.clients[row], metric.rounds[column]): metric.values[row, column]
        for metric in collected
        for row, column in np.argwhere(~np.isnan(metric.values))
    }
    assert found == expected
    assert [metric.name for metric in collected] == sorted({name for name, _, _ in expected})
    for metric in collected:
        assert metric.clients == sorted({client for each in rounds for client, _ in each})
        assert metric.rounds == [2 * i for i, each in enumerate(rounds) if any(n == metric.name for _, n in each)]
