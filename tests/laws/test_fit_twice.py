"""A run is a value: it can be trained any number of times, each time to the same bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.laws.cases import CASES, Records, assert_same, case_run, leaves, silos_of
from tests.laws.test_resume import noisy_choices, timeless
from trainer.data.transforms import Compose, Standardise
from trainer.distributed.gradients import Int8Reducer
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop.fit import fit


def fit_twice(name: str, silos: SiloSpec, choices: dict[str, Any]) -> list[tuple[dict[str, Any], list[Metrics]]]:
    """Return the parameters and the metrics of both trainings of one run."""
    with distributed(silos_of(name, silos)) as topology:
        run = case_run(topology, name, choices)
        outcomes = []
        for _ in range(2):
            records = Records()
            outcomes.append((leaves(fit(run, [records]).model.state_dict()), records.rounds))
        return outcomes


@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_rows(4)
def test_the_second_training_of_a_run_is_the_first(ranks, name: str) -> None:
    """With dropout, batch statistics, gradients that leave residuals, and transforms fitted to the training set."""
    choices = noisy_choices(name) | {
        "gradient_compression": partial(Int8Reducer, block=8),
        "transforms": Compose({"standardise": Standardise()}),
    }
    for (model, rounds), (model_again, rounds_again) in ranks(4).run(fit_twice, name, [3, 1], choices):
        assert_same(model_again, model)
        for metrics, metrics_again in zip(rounds, rounds_again, strict=True):
            assert_same(timeless(metrics_again), timeless(metrics))
