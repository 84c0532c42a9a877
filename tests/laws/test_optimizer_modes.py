"""Optimizers that take gradients at other weights than they have learnt: one law for evaluation, sums, and files.

Within a client's steps the model has the former, and whenever nobody trains the latter.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.laws.cases import SIZES, TEST_EXAMPLES, assert_close, leaves, tiny_data, tiny_model, train
from tests.laws.test_midround import assert_left_and_bit_equal
from tests.laws.test_resume import noisy_choices
from trainer.checkpoint.format import find_saved
from trainer.config.build import build
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.distributed.topology import distributed
from trainer.loop.options import RoundOptions

package = pytest.importorskip("pytorch_optimizer")
schedule_free = partial(package.ScheduleFreeSGD, lr=0.3)
ROUNDS, STEPS = 2, 3
WHOLE: dict[str, Any] = {
    "optimizer": schedule_free,
    "batch_size": "all",
    "rounds": ROUNDS,
    "round": RoundOptions(epochs=STEPS),
}


def examples_of(client: int | None) -> tuple[Tensor, Tensor]:
    """Return the training examples of a client, or of all."""
    edges = np.cumsum([0, *SIZES])
    ids = np.arange(edges[-1]) if client is None else np.arange(edges[client], edges[client + 1])
    return tiny_data(sum(SIZES)).train.fetch(torch.from_numpy(ids))


def train_by_hand(model: torch.nn.Module, optimizer: Any, client: int | None) -> None:
    inputs, targets = examples_of(client)
    optimizer.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    optimizer.eval()


def loss_on_test_set(model: torch.nn.Module) -> float:
    inputs, targets = tiny_data(sum(SIZES)).test.fetch(torch.arange(TEST_EXAMPLES))
    return F.cross_entropy(model(inputs), targets).item()


def test_a_synchronous_run_is_evaluated_at_what_it_has_learnt(ranks):
    model = tiny_model().double()
    optimizer, losses = schedule_free(model.parameters()), []
    for _ in range(ROUNDS):
        train_by_hand(model, optimizer, None)
        losses.append(loss_on_test_set(model))
    for outcome in ranks(2).run(train, "sync", 1, WHOLE):
        assert [metrics["test/loss"] for metrics in outcome.rounds] == pytest.approx(losses, rel=1e-10)
        assert_close(outcome.model, model.state_dict(), 1e-10)


def test_silos_combine_what_their_clients_have_learnt(ranks):
    """FedAvg by hand: each client trains with an optimizer of its own, and the weighted mean is of its averages."""
    model, weights = tiny_model().double(), torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)
    losses = []
    for _ in range(ROUNDS):
        trained = []
        for client in range(len(SIZES)):
            local = tiny_model().double()
            local.load_state_dict(model.state_dict())
            train_by_hand(local, schedule_free(local.parameters()), client)
            trained.append(local.state_dict())
        mean = {name: sum(w * one[name] for w, one in zip(weights, trained, strict=True)) for name in trained[0]}
        model.load_state_dict(mean)
        losses.append(loss_on_test_set(model))
    for outcome in ranks(2).run(train, "fedavg", 2, WHOLE):
        assert [metrics["test/loss"] for metrics in outcome.rounds] == pytest.approx(losses, rel=1e-10)
        assert_close(outcome.model, model.state_dict(), 1e-10)


@pytest.mark.parametrize("name", ["sync", "diloco"])
def test_a_run_that_is_preempted_within_a_round_ends_with_the_same_bits(ranks, name: str, tmp_path: Path):
    """Also where clients keep the state of their optimizer, which is diloco's."""
    choices = noisy_choices(name) | {"optimizer": partial(package.ScheduleFreeAdamW, lr=0.05, warmup_steps=2)}
    assert_left_and_bit_equal(ranks(2), name, 2, choices, tmp_path, {0: (0, 1)})


@pytest.mark.parametrize("kind", ["SOAP", "Shampoo", "Prodigy"])
def test_factors_survive_a_preemption(ranks, kind: str, tmp_path: Path):
    """SOAP and Shampoo keep a covariance of each dimension of a parameter, in lists; Prodigy its rate, in groups."""
    choices = noisy_choices("diloco") | {"optimizer": partial(getattr(package, kind), lr=0.05)}
    assert_left_and_bit_equal(ranks(2), "diloco", 2, choices, tmp_path, {0: (0, 1)})
    saved = find_saved(sorted((tmp_path / "left").glob("round-*"))[-1])
    assert saved
    assert leaves(saved.load("clients")).keys()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["ema_decay=0.9"], "averages its weights itself"),
        (["algorithm=streaming", "algorithm.overlap_steps=1"], "set algorithm.overlap_steps=0"),
        (
            ["optimizer=sgd", "algorithm=fedavg", "server=custom", "server._target_=pytorch_optimizer.ScheduleFreeSGD"],
            "a server has one model for both",
        ),
    ],
    ids=["ema", "overlap", "server"],
)
def test_choices_that_would_mix_both_weights_are_refused(overrides: list[str], reason: str):
    config = read_config(compose_tree(["optimizer=schedulefree", *overrides]))
    with distributed(device="cpu") as topology, pytest.raises(ValueError, match=reason):
        build(config, topology)
