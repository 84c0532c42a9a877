"""The throughput of a round, against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.pool import RankPool
from tests.support.runs import make_run
from trainer.distributed.topology import distributed
from trainer.loop.options import MetricsOptions
from trainer.loop.round import train_round
from trainer.loop.throughput import ThroughputMeter
from trainer.loop.train_state import TrainState
from trainer.models import GPT, MLP, SupportsFlops
from trainer.tasks import Classification

ROUND = {"round/examples": 20, "round/units": 20 * 16}
PEAK = 1e9


def test_a_gpt_counts_six_operations_a_number_and_twelve_a_pair_of_tokens() -> None:
    """6 N + 12 L T d for GPT-2: N by hand, 12 L d^2 in matrices, 13 L d in vectors, the last norm, the embedding."""
    layers, width, vocabulary = 12, 768, 50257
    with torch.device("meta"):
        model = GPT(vocabulary, 1024, layers, 12, width)
    numbers = 12 * layers * width**2 + 13 * layers * width + 2 * width + vocabulary * width
    assert model.flops_per_token(512) == 6 * numbers + 12 * layers * 512 * width
    assert sum(parameter.numel() for parameter in model.parameters()) == numbers + 1024 * width
    assert isinstance(model, SupportsFlops) and not isinstance(MLP(), SupportsFlops)


def figures_of(model: str, **choices: Any) -> dict[str, float]:
    """Return the metrics of a round of 20 examples in 2 seconds, on one rank."""
    with distributed(device="cpu") as topology:
        run = make_run(topology, [20], model, **choices)
        return ThroughputMeter(run, run.model()).metrics(ROUND, 2.0)


def test_the_utilisation_is_what_was_done_over_what_could_have_been() -> None:
    module = GPT(vocabulary=64, length=16, layers=2, heads=2, width=32)
    figures = figures_of("gpt", metrics=MetricsOptions(peak_flops=PEAK, measure_flops=True))
    assert figures.pop("measured_mfu") > 0
    rate = 20 * 16 / 2.0
    assert figures == {
        "examples_per_second": 10.0,
        "tokens_per_second": rate,
        "mfu": module.flops_per_token(16) * rate / PEAK,
    }


def test_a_chip_that_nobody_knows_has_no_utilisation() -> None:
    assert math.isnan(figures_of("gpt")["mfu"])


def test_models_that_count_nothing_and_other_tasks_have_no_tokens() -> None:
    assert list(figures_of("mlp")) == ["examples_per_second"]
    assert list(figures_of("gpt", module=nn.Embedding(64, 64))) == ["examples_per_second", "tokens_per_second"]


class Syllables(Classification):
    """A task that is no LanguageModelling: each example has 16 tokens."""

    unit_name = "token"

    def units(self, targets: Tensor) -> int:
        return 16


def test_the_tokens_of_any_task_are_counted() -> None:
    assert figures_of("mlp", task=Syllables()) == {"examples_per_second": 10.0, "tokens_per_second": 160.0}


def told_by_a_rank() -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of a round, and the result."""
    with distributed(device="cpu") as topology:
        run = make_run(topology, [20], "gpt", metrics=MetricsOptions(peak_flops=PEAK))
        state = TrainState(run)
        metrics = train_round(state, run.sample_round(0))
        assert metrics is not None
        state.progress.advance(metrics, 0.0)
        return metrics, state.progress.result()


def test_ranks_bring_their_chips_together(ranks: Callable[[int], RankPool]) -> None:
    """On two ranks half of twice the peak is used, and all report the same."""
    (metrics, result), (others, _) = ranks(2).run(told_by_a_rank)
    assert metrics["round/units"] == 20 * 16
    assert metrics["memory/peak_bytes"] == others["memory/peak_bytes"] > 1e7
    operations = GPT(vocabulary=64, length=16, layers=2, heads=2, width=32).flops_per_token(16)
    assert metrics["mfu"] == pytest.approx(operations * metrics["tokens_per_second"] / (2 * PEAK))
    assert result["tokens_per_second"] == pytest.approx(metrics["tokens_per_second"])
    assert result["tokens_per_second"] == pytest.approx(16 * result["examples_per_second"])
