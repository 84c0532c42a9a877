"""Runs with compressed gradients inside a silo: they resume to the last bit, and reach nearly the same loss."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.laws.cases import Records, assert_close, assert_same, case_run, leaves, one_round
from tests.laws.test_midround import Orders, other_number_of_replicas, run_part
from tests.laws.test_resume import ROUNDS, interrupted_and_not, noisy_choices, round_checkpoint, text_choices, timeless
from tests.laws.test_world_size import BATCHES, double_run
from trainer.checkpoint.format import SavedState
from trainer.data import DataSplits, TensorSource
from trainer.data.client_sampling.sampling import AllClients
from trainer.distributed.gradients import (
    FullPrecisionReducer,
    HalfPrecisionReducer,
    Int8Reducer,
    PowerSGDReducer,
)
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions, TrainingOptions
from trainer.loop.run import GradientReducerFactory
from trainer.loop.train_state import TrainState

pytestmark = pytest.mark.long

WAYS: dict[str, GradientReducerFactory] = {
    "int8": partial(Int8Reducer, block=8),
    "powersgd": partial(PowerSGDReducer, rank=1, start=2),
}
TOLERANCES: dict[str, tuple[GradientReducerFactory, float]] = {
    "bf16": (partial(HalfPrecisionReducer, "bfloat16"), 0.01),
    "fp16": (partial(HalfPrecisionReducer, "float16"), 0.001),
    "int8": (WAYS["int8"], 0.01),
    "powersgd": (WAYS["powersgd"], 0.1),
}
ways = pytest.mark.parametrize("way", WAYS)


def choices_of(way: str, name: str) -> dict[str, Any]:
    return noisy_choices(name) | {"gradient_compression": WAYS[way], "round": RoundOptions(steps=4)}


def assert_same_run(ours: SavedState, theirs: SavedState) -> None:
    """Compare the whole state, including the residuals that each replica keeps; there must be some."""
    for section in ("model", "algorithm", "clients"):
        assert_same(leaves(ours.load(section)), leaves(theirs.load(section)))
    assert ours.shards == theirs.shards
    owned = [leaves(ours.load_shard(part, "own")) for part in ours.shards]
    assert any(value.any() for own in owned for value in own.values() if torch.is_tensor(value))
    for own, part in zip(owned, theirs.shards, strict=True):
        assert_same(own, leaves(theirs.load_shard(part, "own")))


def assert_resumed(pool, name: str, silos: Any, choices: dict[str, Any], folder: Path) -> None:
    (ours, our_rounds), (theirs, their_rounds) = interrupted_and_not(pool, name, silos, choices, folder)
    assert_same_run(round_checkpoint(ours, ROUNDS), round_checkpoint(theirs, ROUNDS))
    for one, other in zip(our_rounds, their_rounds, strict=True):
        assert_same(timeless(one), timeless(other))


def assert_left(
    pool, name: str, silos: Any, choices: dict[str, Any], folder: Path, *orders: Orders, part: Any = run_part
) -> None:
    for order in orders:
        assert pool.run(part, name, silos, choices, folder / "left", order)[0] is None
    pool.run(part, name, silos, choices, folder / "left", None)
    pool.run(part, name, silos, choices, folder / "alone", None)
    assert_same_run(round_checkpoint(folder / "left", ROUNDS), round_checkpoint(folder / "alone", ROUNDS))


@pytest.mark.parametrize("size", [2, 3])
@ways
def test_resumed_between_rounds(ranks, way: str, size: int, tmp_path: Path):
    assert_resumed(ranks(size), "sync", 1, choices_of(way, "sync"), tmp_path)


@pytest.mark.parametrize("silos", [[2, 2], [2, 1]])
@ways
def test_resumed_between_rounds_with_clients_that_keep_their_state(ranks, way: str, silos: list[int], tmp_path: Path):
    """Four of seven clients take part. A residual belongs to a replica and a client; a silo of one rank has none."""
    assert_resumed(ranks(sum(silos)), "diloco", silos, choices_of(way, "diloco"), tmp_path)


@pytest.mark.parametrize("size", [2, 3])
@ways
def test_left_inside_a_round(ranks, way: str, size: int, tmp_path: Path):
    """The run is left after one step of the second round, or after three."""
    assert_left(ranks(size), "sync", 1, choices_of(way, "sync"), tmp_path, {0: (0, 1)}, {0: (0, 3)})


@ways
def test_left_inside_a_round_by_one_of_the_silos(ranks, way: str, tmp_path: Path):
    """The silo leaves in the middle of its second client."""
    assert_left(ranks(4), "diloco", [2, 2], choices_of(way, "diloco"), tmp_path, {0: (1, 2)})


def run_part_that_overflows(*arguments: Any) -> Records | None:
    """Call `run_part` with an initial loss scale at which the first steps overflow."""
    with patch.object(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40)):
        return run_part(*arguments)


@ways
def test_left_while_steps_overflow(ranks, way: str, tmp_path: Path):
    """In float16, residuals stay finite, and follow the loss scale."""
    choices = text_choices(0.2) | {
        "autocast": torch.float16,
        "round": RoundOptions(steps=12),
        "gradient_compression": WAYS[way],
    }
    assert_left(ranks(2), "sync", 1, choices, tmp_path, {0: (0, 2)}, {0: (0, 9)}, part=run_part_that_overflows)
    saved = round_checkpoint(tmp_path / "left", ROUNDS)
    clients = leaves(saved.load("clients"))
    assert clients["0/scaler/scale"] < 2.0**40
    owned = [leaves(saved.load_shard(part, "own")) for part in saved.shards] + [clients]
    assert all(value.isfinite().all() for own in owned for value in own.values() if torch.is_tensor(value))


def gone_on_elsewhere(choices: dict[str, Any], folder: Path) -> Records:
    return other_number_of_replicas(choices, folder)[0]


@ways
def test_another_number_of_replicas_goes_on(ranks, way: str, tmp_path: Path):
    """Left by 2 replicas inside a round, resumed by 1, which has no residual, and by 3, which share the residuals."""
    choices = text_choices(0.0) | {"gradient_compression": WAYS[way]}
    assert ranks(2).run(run_part, "sync", 1, choices, tmp_path / "left", {0: (0, 2)})[0] is None
    alone = ranks(2).run(run_part, "sync", 1, choices, tmp_path / "alone", None)[0]
    for size in (1, 3):
        resumed = ranks(size).run(gone_on_elsewhere, choices, tmp_path / "left")[0]
        for one, other in zip(resumed.rounds[::-1], alone.rounds[::-1], strict=False):
            assert one["examples"] == other["examples"]
            assert_close({"loss": one["train/loss"]}, {"loss": other["train/loss"]}, 0.05)


def owed_by_the_finite(way: str) -> tuple[float, dict[int, dict[str, Any]]]:
    """Return the number of clients left out of the last round, and the clients' states; one has infinite inputs."""
    with distributed([2, 2]) as topology:
        choices = choices_of(way, "diloco") | {"client_sampling": AllClients(), "rounds": 3}
        run = case_run(topology, "diloco", choices)
        inputs, targets = run.data.train.fetch(torch.arange(len(run.data.train)))
        inputs[run.clients.train[3]] = float("inf")
        run = replace(
            run,
            data=DataSplits(TensorSource(inputs, targets), run.data.test, 3),
            training=TrainingOptions(max_nonfinite_rounds=9),
        )
        state = TrainState(run)
        rounds = [one_round(state, index) for index in range(3)]
        return rounds[-1]["clients/nonfinite"], {
            client: leaves(kept) for client, kept in state.trainer.clients.states.items()
        }


@ways
def test_a_client_that_is_left_out_leaves_nothing_to_others(ranks, way: str):
    """Its gradients are not finite, but the residuals of the clients that the same replicas train after it are."""
    for left_out, kept in ranks(4).run(owed_by_the_finite, way):
        assert left_out == 1 and 3 not in kept
        assert all(value.isfinite().all() for own in kept.values() for value in own.values() if torch.is_tensor(value))


def losses(batches: str, reducer: GradientReducerFactory) -> list[float]:
    """Return the losses of a run of 12 rounds."""
    with distributed(1) as topology:
        records = Records()
        choices = {"rounds": 12, "optimizer": partial(torch.optim.SGD, lr=0.5), "gradient_compression": reducer}
        fit(double_run(topology, "mlp", BATCHES[batches], **choices), [records])
        return [metrics["train/loss"] for metrics in records.rounds]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("batches", ["ragged", "one_left", "micro"])
@pytest.mark.parametrize("way", TOLERANCES)
def test_training_comes_to_the_loss_of_full_precision(ranks, way: str, batches: str, size: int):
    """Some replicas have no examples, or other numbers of micro-batches; the loss of each round is nearly the same."""
    gradients, tolerance = TOLERANCES[way]
    expected = ranks(size).run(losses, batches, FullPrecisionReducer)[0]
    ours = ranks(size).run(losses, batches, gradients)[0]
    assert expected[-1] < 0.6 * expected[0]
    np.testing.assert_allclose(ours, expected, rtol=tolerance)
