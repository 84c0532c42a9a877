"""Ten thousand clients of two or three examples each."""

from __future__ import annotations

import pytest

from tests.laws.cases import train
from trainer.data.client_sampling.sampling import UniformSampler

SIZES = [2, 3] * 5000


@pytest.mark.parametrize("cohort", [10, pytest.param(len(SIZES), marks=pytest.mark.long)])
def test_a_round_trains_its_cohort_and_evaluates_all(ranks, cohort: int) -> None:
    choices = {"sizes": SIZES, "client_sampling": UniformSampler(cohort), "rounds": 1}
    found = ranks(2).run(train, "fedavg", 2, choices)
    (metrics,) = found[0].rounds
    assert 2 * cohort <= metrics["round/examples"] <= 3 * cohort and metrics["test/loss"] > 0
    assert all(part.rounds[0]["train/loss"] == metrics["train/loss"] for part in found)
