"""The metrics of a round from sums, against numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.runs import fedavg, make_run
from trainer.algorithms.aggregation_rule import mean_cosine
from trainer.algorithms.round import Round
from trainer.distributed.topology import Topology
from trainer.loop.local_trainer import ClientResult
from trainer.loop.options import MetricsOptions
from trainer.loop.round_metrics import (
    RoundAccumulator,
    evaluation_metrics,
    reports_clients,
    round_metrics,
    slowest_silo,
)
from trainer.models.flat import FlatModel

SUMS = ("examples_seen", "steps", "units_seen", "loss_sum", "units", "gradient_norms", "on_time", "learning_rates")
SUMS += ("counted", "clients", "left_out", "late")
ALONE = Topology(0, 1, 0, 0, (1,), torch.device("cpu"), None, None)


def header_sums(weights: np.ndarray, deltas: np.ndarray) -> dict[str, float]:
    """Return the sums for the cosine."""
    norms = np.linalg.norm(deltas, axis=1)
    return {
        "weight": float(weights.sum()),
        "weighted_norms": float((weights * norms).sum()),
        "squared_weighted_norms": float(((weights * norms) ** 2).sum()),
    }


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 20), st.integers(0, 1000))
def test_mean_cosine_is_that_of_all_pairs(clients: int, size: int, seed: int):
    """By numpy, for every pair: the sum over i != j of u_i u_j cos(d_i, d_j), over that of u_i u_j, with u = w |d|."""
    generator = np.random.default_rng(seed)
    weights, deltas = generator.integers(1, 100, clients).astype(float), generator.normal(size=(clients, size)) + 0.5
    norms = np.linalg.norm(deltas, axis=1)
    pairs = np.outer(weights * norms, weights * norms) * (1 - np.eye(clients))
    cosines = deltas @ deltas.T / np.outer(norms, norms)
    update_norm = float(np.linalg.norm((weights / weights.sum()) @ deltas))
    expected = (pairs * cosines).sum() / pairs.sum()
    assert mean_cosine(header_sums(weights, deltas), update_norm) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("second", "cosine"), [([3.0, 0.0], 1.0), ([-2.0, 0.0], -1.0), ([0.0, 5.0], 0.0)])
def test_cosines_of_known_angles(second: list[float], cosine: float):
    weights, deltas = np.array([2.0, 3.0]), np.array([[1.0, 0.0], second])
    update_norm = float(np.linalg.norm(weights / 5 @ deltas))
    assert mean_cosine(header_sums(weights, deltas), update_norm) == pytest.approx(cosine, abs=1e-12)


def test_one_client_and_no_client_have_no_cosine():
    delta = np.array([[0.1, 0.2, 0.3]])
    assert math.isnan(mean_cosine(header_sums(np.array([7.0]), delta), float(np.linalg.norm(delta))))
    assert math.isnan(mean_cosine(header_sums(np.zeros(1), delta), 0.0))
    assert math.isnan(mean_cosine(header_sums(np.ones(2), np.zeros((2, 3))), 0.0))


def run_of(sizes: list[int], **choices: Any):
    return make_run(ALONE, sizes, algorithm=fedavg(), **choices)


def sums_of(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the sums of an evaluation with two classes, in which all examples were taken for the correct one."""
    by_confidence = torch.zeros(15, 3)
    by_confidence[-1] = torch.tensor([40.0, 39.0, 40.0])
    nothing = table.new_zeros(len(table), 0)
    return {
        "clients": table,
        "by_client": nothing,
        "by_class": torch.full((2, 3), 20.0),
        "by_confidence": by_confidence,
    }


POOLED = {"macro_f1": 1.0, "sensitivity": 1.0, "specificity": 1.0, "calibration_error": 1 / 40}


def test_evaluations_are_pooled_over_examples_and_told_by_client():
    """Clients have 10, 30 and no test examples. The worst one is named, and those without examples have no metrics."""
    table = torch.tensor([[10, 5.0, 9], [30, 90.0, 15], [0, 0, 0]], dtype=torch.float64)
    metrics = evaluation_metrics(run_of([4, 4, 4]), "test", sums_of(table))
    expected = {
        "test/loss": 95 / 40,
        "test/accuracy": 24 / 40,
        **{f"test/{name}": value for name, value in POOLED.items()},
        "client/0/test_accuracy": 0.9,
        "client/1/test_accuracy": 0.5,
        "clients/worst_accuracy": 0.5,
        "clients/accuracy_std": 0.2,
        "clients/jain": (0.9 + 0.5) ** 2 / (2 * (0.9**2 + 0.5**2)),
    }
    assert metrics == pytest.approx(expected)


def test_validation_is_not_told_by_client():
    table = torch.tensor([[10, 5.0, 9], [30, 90.0, 15]], dtype=torch.float64)
    assert set(evaluation_metrics(run_of([4, 4]), "validation", sums_of(table))) == {
        f"validation/{name}" for name in ("loss", "accuracy", *POOLED, "worst_accuracy", "accuracy_std", "jain")
    }


def test_a_run_can_hide_its_clients():
    table = torch.tensor([[10, 5.0, 9], [30, 90.0, 15]], dtype=torch.float64)
    hiding = run_of([4, 4], metrics=MetricsOptions(per_client="none"))
    expected = {f"test/{name}" for name in ("loss", "accuracy", *POOLED)}
    assert set(evaluation_metrics(hiding, "test", sums_of(table))) == expected
    assert [reports_clients(run) for run in (hiding, run_of([4]), run_of([4, 4]))] == [False, False, True]


def test_the_worst_perplexity_is_the_largest():
    run = make_run(ALONE, [4, 4], "gpt", fedavg())
    table = torch.tensor([[16, 16.0], [16, 32.0]], dtype=torch.float64)
    sums = {"clients": table, "by_client": table.new_zeros(2, 0)}
    assert evaluation_metrics(run, "test", sums)["clients/worst_perplexity"] == pytest.approx(math.e**2)


@pytest.mark.parametrize(("per_client", "is_named"), [("none", False), ("scores", True), ("full", True)])
def test_the_slowest_silo_may_be_a_client(per_client: Any, is_named: bool):
    """With a client a silo its seconds are those of a client, which per_client=none hides."""
    topology = Topology(0, 2, 0, 0, (1, 1), torch.device("cpu"), None, None)
    run = make_run(topology, [8, 8], algorithm=fedavg(), **{"metrics.per_client": per_client})
    sums = dict.fromkeys(SUMS, 1.0)
    tables = {"silos": torch.ones(2, 2), "cohort": torch.zeros(0, 3), "ranks/memory": torch.zeros(2)}
    metrics = round_metrics(run, Round(0, 0, (0, 1)), sums, tables)
    assert any(name.startswith("slowest/") for name in metrics) == is_named


def test_the_slowest_silo_is_the_one_with_most_seconds():
    silos = torch.tensor([[1.0, 5.0], [0.5, 7.0], [3.0, 1.0]], dtype=torch.float64)
    assert slowest_silo(silos) == {"slowest/silo": 1, "slowest/data": 0.5, "slowest/compute": 7.0}
    assert slowest_silo(silos[:1]) == {}


def test_a_tally_is_exact_in_float64():
    """Sums above 2^24, where float32 skips integers, arrive unchanged in the clients' rows."""
    run = run_of([4, 4])
    tally = RoundAccumulator(run, Round(0, 0, (0, 1)), FlatModel(run.model()).statistics)
    losses = [torch.tensor(2.0**24 + 2, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)]
    tally.add(ClientResult(1, 4, losses=losses, units=2**24 + 1, steps=2), 0.1)
    assert tally.scalars()["loss_sum"] == 2**24 + 3
    assert tally.tables()["cohort"].tolist() == [[0, 0, 0], [2**24 + 3, 2**24 + 1, 0.1]]
    assert all(table.dtype == torch.float64 for table in tally.tables().values())


def test_what_is_equal_in_a_silo_is_told_by_its_leader():
    """Steps and examples of a replica that leads no silo are zeros, but not its part of the loss."""
    follower = Topology(1, 2, 0, 1, (2,), torch.device("cpu"), None, None)
    run = make_run(follower, [4, 4], algorithm=fedavg())
    tally = RoundAccumulator(run, Round(0, 0, (0, 1)), FlatModel(run.model()).statistics)
    tally.add(ClientResult(0, 4, losses=[torch.tensor(3.0)], units=2, steps=2, examples_seen=4), 0.1)
    scalars = tally.scalars()
    assert scalars.pop("loss_sum") == 3 and scalars.pop("units") == scalars.pop("units_seen") == 2
    assert set(scalars.values()) == {0}
    assert tally.tables()["cohort"].tolist() == [[3, 2, 0], [0, 0, 0]]
