"""`averaging` is FedAvg with the mean as its server, also for a silo without a copy of the global model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.cases import Only, Outcome, assert_close, figures, tiny_data, tiny_model, train
from tests.laws.heterogeneity import DEADLINE, by_clock, slow_choices
from tests.laws.test_midround import assert_left_and_bit_equal
from tests.laws.test_resume import noisy_choices
from trainer.distributed.silos import SiloSpec

# The clients of two silos: one each, then two in one of them, none in one of them, and one each again.
COHORTS = Only(((0, 1), (2, 3, 4), (5,), (6, 0)))


def assert_mean(averaging: list[Outcome], fedavg: list[Outcome]) -> None:
    """Assert that models and metrics are those of FedAvg, which also reports deltas."""
    assert_close(averaging[0].model, fedavg[0].model)
    for one, other in zip(averaging[0].rounds, fedavg[0].rounds, strict=True):
        common = {name: value for name, value in figures(other).items() if "delta" not in name}
        assert figures(one) == pytest.approx(common, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(("world", "silos"), [(2, 2), (4, [2, 2]), (4, [3, 1])], ids=str)
@pytest.mark.parametrize("choices", [{}, {"eval.personal_steps": 2}], ids=["", "tuned"])
@pytest.mark.quick_rows(4)
def test_it_is_the_mean_whoever_is_alone(ranks, world: int, silos: SiloSpec, choices: dict[str, Any]):
    """It holds also if the evaluation makes clients' personal models on the only model in memory."""
    choices = {"client_sampling": COHORTS, "rounds": 4, **choices}
    assert_mean(*(ranks(world).run(train, name, silos, choices) for name in ("averaging", "fedavg")))


def test_a_late_client_that_is_dropped_leaves_no_trace(ranks):
    """In the second round it is the only client, so nothing is combined."""
    choices = slow_choices(
        0, client_sampling=Only(((1, 2), (0,), (0, 3))), rounds=3, round=replace(DEADLINE, stragglers="drop")
    )
    assert_mean(*(ranks(2).run(by_clock, train, name, 2, choices) for name in ("averaging", "fedavg")))


def test_a_client_that_weighs_nothing_leaves_no_trace(ranks):
    choices = {"sizes": [5, 0, 7], "client_sampling": Only(((0, 2), (1,), (0, 2))), "rounds": 3}
    assert_mean(*(ranks(2).run(train, name, 2, choices) for name in ("averaging", "fedavg")))


def test_the_mean_is_kept_in_float32_of_a_model_that_would_round_it(ranks):
    choices = {
        "client_sampling": COHORTS,
        "rounds": 4,
        "module": tiny_model().bfloat16(),
        "data": tiny_data(72, torch.bfloat16),
    }
    averaging, fedavg = (ranks(2).run(train, name, 2, choices)[0].algorithm for name in ("averaging", "fedavg"))
    assert averaging["parameters"].dtype == torch.float32
    assert_close(averaging, {"parameters": fedavg["parameters"]}, 1e-6)


def test_a_silo_leaves_while_it_trains_its_only_client(ranks, tmp_path: Path):
    choices = noisy_choices("averaging") | {"client_sampling": Only(((0, 1),))}
    assert_left_and_bit_equal(ranks(2), "averaging", 2, choices, tmp_path, {0: (0, 2)})
