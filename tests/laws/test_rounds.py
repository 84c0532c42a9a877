"""Laws of one round: all ranks end with the same bits, an empty cohort moves nothing, and a NaN does not spread."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.laws.cases import (
    AT_ONCE,
    CASES,
    COMBINED,
    EXACT,
    SIZES,
    VOTING,
    Only,
    Outcome,
    assert_close,
    assert_same,
    case_run,
    every_client,
    figures,
    outcome,
    silos_of,
    tiny_data,
    tiny_model,
    train,
)
from trainer.data import DataSplits, TensorSource
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.evaluate import evaluate
from trainer.loop.options import RoundOptions
from trainer.loop.round import train_round
from trainer.loop.train_state import TrainState

EVERYONE = tuple(range(len(SIZES)))
BAD, SILENT = 3, 5


def norm_model() -> nn.Module:
    """Return a float32 model with batch statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("silos", [2, [3, 1]], ids=["2", "3+1"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_rows(4)
def test_after_a_round_all_ranks_hold_the_same_bits(ranks, name: str, silos: SiloSpec):
    """Shared parameters, batch statistics and the server's state are torch.equal to rank 0's, and have moved."""
    choices = {
        "module": norm_model(),
        "data": tiny_data(8 * sum(SIZES), torch.float32),
        "sizes": [8 * size for size in SIZES],
        "batch_size": "all" if name == "fedsgd" else 9,
    }
    outcomes = ranks(2 if silos == 2 else 4).run(train, name, silos, choices)
    for other in outcomes[1:]:
        assert_same(other.model, outcomes[0].model)
        held = other.algorithm.items()  # if silos differ in size, followers have no part of the server's state
        assert_same(dict(held), {name: outcomes[0].algorithm[name] for name, _ in held})
    assert_same(outcomes[-1].algorithm, outcomes[0].algorithm)
    moved = [key for key, tensor in norm_model().state_dict().items() if key in outcomes[0].model]
    assert len(moved) == (0 if name == "local" else 8)
    assert not any(torch.equal(outcomes[0].model[key], norm_model().state_dict()[key]) for key in moved)


def around_an_empty_round(name: str, silos: SiloSpec) -> tuple[Outcome, Outcome]:
    """Return the state of a run before and after its third round, which has an empty cohort."""
    with distributed(silos_of(name, silos)) as topology:
        run = case_run(topology, name, {"rounds": 3, "module": tiny_model()} | float32_data())
        state = TrainState(run)
        rounds = [train_round(state, run.sample_round(index)) for index in range(2)]
        before = outcome(state, rounds)
        rounds = [train_round(state, replace(run.sample_round(2), cohort=())) | evaluate(state)]
        return before, outcome(state, rounds)


def float32_data() -> dict[str, Any]:
    return {"data": tiny_data(sum(SIZES), torch.float32)}


@pytest.mark.parametrize("name", AT_ONCE)
@pytest.mark.quick_rows(9)
def test_an_empty_cohort_moves_nothing(ranks, name: str):
    """Parameters, server and clients keep their bits; the round has no loss and no examples."""
    for before, after in ranks(2).run(around_an_empty_round, name, 2):
        assert_same(before.model, after.model)
        assert_same(before.algorithm, after.algorithm)
        assert set(before.clients) == set(after.clients)
        for client, kept in before.clients.items():
            assert_same(kept, after.clients[client])
        (metrics,) = after.rounds
        assert metrics["round/examples"] == metrics["round/steps"] == metrics["clients/trained"] == 0
        assert math.isnan(metrics["train/loss"])
        assert math.isfinite(metrics["test/loss"])


def spoiled(examples: int, first: int) -> DataSplits:
    """Return the usual data with a NaN in one input of example `first`."""
    data = tiny_data(examples)
    inputs, targets = data.train.fetch(torch.arange(examples))
    inputs[first, 2] = math.nan
    return DataSplits(TensorSource(inputs, targets), data.test, data.classes)


@pytest.mark.parametrize("silos", [2, [3, 1]], ids=["2", "3+1"])
# If updates are compressed, clients have the same silos in both runs.
@pytest.mark.parametrize("name", [name for name in VOTING if name in (*EXACT, "topk", "int4_scaffold")])
@pytest.mark.quick_rows(4)
def test_a_nan_client_changes_nothing_but_the_weights(ranks, name: str, silos: SiloSpec):
    """With a NaN client and an absent one, the run is that of the other five: model, server, states and averages."""
    data = spoiled(sum(SIZES), sum(SIZES[:BAD]))
    pool = ranks(2 if silos == 2 else 4)
    # `per_client` is off, since only the bad client's row may differ.
    choices = {"data": data, "rounds": 3, "metrics.per_client": "none"}
    speaking = Only((tuple(client for client in EVERYONE if client != SILENT),))
    ours = pool.run(train, name, silos, choices | {"client_sampling": speaking})
    others = Only((tuple(client for client in EVERYONE if client not in (BAD, SILENT)),))
    theirs = pool.run(train, name, silos, choices | {"client_sampling": others})
    assert_close(ours[0].model, theirs[0].model)
    assert_close(ours[0].algorithm, theirs[0].algorithm)
    kept, expected = every_client(ours), every_client(theirs)
    for client in expected:
        assert_close(kept[client], expected[client])
    counts = ("round/", "clients/")
    for ours_round, theirs_round in zip(ours[0].rounds, theirs[0].rounds, strict=True):
        assert ours_round["clients/nonfinite"] == 1
        judged = {key: value for key, value in figures(ours_round).items() if not key.startswith(counts)}
        assert judged == pytest.approx({key: theirs_round[key] for key in judged}, rel=1e-10, nan_ok=True)
        assert math.isfinite(judged["train/loss"])


@pytest.mark.parametrize("name", VOTING)
@pytest.mark.quick_rows(6)
def test_a_nan_client_keeps_the_state_it_had(ranks, name: str):
    """A client's state changes only in a round that counts, so it has no NaN."""
    data = spoiled(sum(SIZES), sum(SIZES[:BAD]))
    kept = every_client(ranks(2).run(train, name, 2, {"data": data}))
    tensors = [leaf for leaf in kept.get(BAD, {}).values() if isinstance(leaf, torch.Tensor)]
    assert all(bool(leaf.isfinite().all()) for leaf in tensors)


@pytest.mark.parametrize("name", [name for name in COMBINED if name in VOTING and name in AT_ONCE])
@pytest.mark.quick_rows(6)
def test_a_round_of_nan_clients_moves_nothing(ranks, name: str):
    """Only the bad client takes part in the second round: the model, its statistics and the server do not change."""
    size = 10
    data = spoiled(size * len(SIZES), size * BAD)
    choices = {
        "module": norm_model().double(),
        "data": data,
        "sizes": [size] * len(SIZES),
        "batch_size": "all" if name == "fedsgd" else 5,
    }
    good = tuple(client for client in EVERYONE if client != BAD)
    before = ranks(2).run(train, name, 2, choices | {"client_sampling": Only((good,)), "rounds": 1})
    after = ranks(2).run(train, name, 2, choices | {"client_sampling": Only((good, (BAD,))), "rounds": 2})
    for ours, theirs in zip(after, before, strict=True):
        assert_same(ours.model, theirs.model)
        assert_same(ours.algorithm, theirs.algorithm)
        assert ours.rounds[1]["test/loss"] == theirs.rounds[0]["test/loss"]
        assert ours.rounds[1]["clients/nonfinite"] == 1


@pytest.mark.parametrize("length", [RoundOptions(epochs=2), RoundOptions(steps=5)], ids=["epochs", "steps"])
def test_a_round_counts_what_went_through_the_model(ranks, length: RoundOptions):
    """Examples and steps of all clients: ceil(n_k / batch) steps an epoch, or a number of steps across epochs."""
    sizes, batch_size = [5, 8, 3], 4
    (first, _) = ranks(2).run(train, "fedavg", 2, {"sizes": sizes, "round": length, "rounds": 1})
    batches = [[min(batch_size, size - start) for start in range(0, size, batch_size)] for size in sizes]
    wanted = [(of_client * 5)[: length.steps or 2 * len(of_client)] for of_client in batches]
    assert first.rounds[0]["round/steps"] == sum(map(len, wanted))
    assert first.rounds[0]["round/examples"] == sum(map(sum, wanted))
