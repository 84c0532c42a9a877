"""FedAvg's options against a loop by hand: weights, shared and kept state, limits, the proximal term."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from tests.laws.cases import (
    CLASSES,
    FEATURES,
    SIZES,
    TEST_EXAMPLES,
    Outcome,
    assert_close,
    assert_same,
    case_run,
    figures,
    leaves,
    one_round,
    tiny_data,
    train,
)
from tests.laws.quadratics import START, Walk, bowl_choices, path
from tests.laws.test_batch_statistics import (
    BIG,
    EDGES,
    Statistics,
    assert_statistics,
    norm_choices,
    norm_first,
    pooled,
    replica_statistics,
    replicas_by_client,
)
from tests.laws.test_equivalences import batch_of
from trainer.algorithms import FedAvg
from trainer.data import DataSplits, TensorSource
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop.train_state import TrainState
from trainer.utils.seeding import generator

ROUNDS, BOUND, CAP, BATCH_SIZE, RATE = 5, 6.0, 8, 4, 0.1
FEDBN = Path(__file__).parents[2] / "conf/algorithm/fedbn.yaml"

Deltas = Callable[[np.ndarray], np.ndarray]
momentum = partial(torch.optim.SGD, lr=RATE, momentum=0.9)


# One client after the other on quadratics, by numpy


def averaged(deltas: Deltas, weights: list[int]) -> np.ndarray:
    """Return the global points after each round: w <- w - sum_k p_k d_k."""
    found, place = [], START
    for _ in range(ROUNDS):
        place = place - np.average(deltas(place), axis=0, weights=weights)
        found.append(place)
    return np.stack(found)


def shortened(deltas: np.ndarray) -> np.ndarray:
    """Return d_k min(1, bound / |d_k|)."""
    return deltas * np.minimum(1, BOUND / np.linalg.norm(deltas, axis=1, keepdims=True))


def follow(ranks: Any, walk: Walk, silos: SiloSpec = 2, **slots: Any) -> np.ndarray:
    """Return the global points after each round of FedAvg with these options."""
    choices = bowl_choices(walk, rounds=ROUNDS)
    return ranks(2 if silos == 2 else 4).run(path, silos, partial(FedAvg, **slots), choices)[0]


@pytest.mark.parametrize("silos", [2, [3, 1]], ids=["2", "3+1"])
@pytest.mark.parametrize("walk", [Walk(pull=0.7), Walk(0.05, 0.9, pull=0.7)], ids=["sgd", "momentum"])
def test_fedprox_is_pulled_to_where_its_round_began(ranks, walk: Walk, silos: SiloSpec):
    """Each step's gradient includes mu (w - x), which the server does not see: Li et al. 2020, algorithm 2."""
    expected = averaged(walk.deltas, SIZES)
    np.testing.assert_allclose(follow(ranks, walk, silos, proximal_mu=walk.pull), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("silos", [2, [3, 1]], ids=["2", "3+1"])
def test_longer_deltas_than_the_bound_are_shortened(ranks, silos: SiloSpec):
    """Some deltas are longer and some are not; they are shortened before they are weighted."""
    norms = np.linalg.norm(Walk().deltas(START), axis=1)
    assert norms.min() < BOUND < norms.max()
    expected = averaged(lambda place: shortened(Walk().deltas(place)), SIZES)
    np.testing.assert_allclose(follow(ranks, Walk(), silos, max_update_norm=BOUND), expected, rtol=1e-12, atol=1e-12)


def test_capped_weights(ranks):
    """p_k is proportional to min(n_k, cap)."""
    expected = averaged(Walk().deltas, [min(size, CAP) for size in SIZES])
    np.testing.assert_allclose(
        follow(ranks, Walk(), weighting="capped", max_weight=CAP), expected, rtol=1e-12, atol=1e-12
    )


# Options without effect


NOTHING: dict[str, dict[str, Any]] = {
    "mu=0": {"proximal_mu": 0.0},
    "mu=1e-300": {"proximal_mu": 1e-300},  # runs all the code of FedProx
    "beta=0": {"server": partial(torch.optim.SGD, lr=1.0, momentum=0.0)},
    "bound=1e300": {"max_update_norm": 1e300},
    "cap=1e9": {"weighting": "capped", "max_weight": 10**9},
    "shared=.": {"shared_params": "."},
}


def with_slots(ranks: Any, silos: SiloSpec, slots: dict[str, Any]) -> Outcome:
    """Return the state after three rounds with momentum."""
    choices = {"rounds": 3, "optimizer": momentum, "algorithm": FedAvg(**slots)}
    return ranks(2 if silos == 2 else 4).run(train, "fedavg", silos, choices)[0]


@pytest.fixture(scope="module", params=[2, [3, 1]], ids=["2", "3+1"])
def plain(ranks, request: pytest.FixtureRequest) -> tuple[SiloSpec, Outcome]:
    """Return silos, and FedAvg on them."""
    return request.param, with_slots(ranks, request.param, {})


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.quick_rows(4)
def test_slots_that_say_nothing_are_fedavg_bit_for_bit(ranks, plain: tuple[SiloSpec, Outcome], name: str):
    """Model and metrics of all rounds are equal."""
    silos, fedavg = plain
    ours = with_slots(ranks, silos, NOTHING[name])
    assert_same(ours.model, fedavg.model)
    for mine, theirs in zip(ours.rounds, fedavg.rounds, strict=True):
        assert_same(figures(mine), figures(theirs))


def test_a_cap_of_one_is_equal_weights(ranks):
    ours, theirs = follow(ranks, Walk(), weighting="capped", max_weight=1), follow(ranks, Walk(), weighting="equal")
    assert np.array_equal(ours, theirs)


# FedBN


def norm_model() -> nn.Module:
    """Return a model with two normalisation layers."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = {"bn0": nn.BatchNorm1d(FEATURES), "hidden": nn.Linear(FEATURES, 5), "norm": nn.BatchNorm1d(5)}
        return nn.Sequential(OrderedDict(layers | {"bend": nn.Tanh(), "head": nn.Linear(5, CLASSES)})).double()


def is_norm(name: str) -> bool:
    return name.startswith(("bn0.", "norm."))


States = dict[int, dict[str, Tensor]]


def clients_models(client_optimizer_state: Any) -> tuple[States, Metrics]:
    """Return the models of this silo's clients after three rounds, and the last metrics."""
    with distributed(2) as topology:
        shared = yaml.safe_load(FEDBN.read_text())["shared_params"]
        choices = {
            "algorithm": FedAvg(shared_params=shared, client_optimizer_state=client_optimizer_state),
            "rounds": 3,
        }
        run = case_run(
            topology, "fedavg", choices | norm_choices(module=norm_model(), batch_size=BATCH_SIZE, optimizer=momentum)
        )
        state = TrainState(run)
        metrics = [one_round(state, index) for index in range(run.rounds)][-1]
        models = {}
        for client in state.trainer.clients.states:
            state.trainer.load_personal(client)
            models[client] = leaves(state.model.module.state_dict())
        return models, metrics


def plain_fedbn(client_optimizer_state: str) -> tuple[States, dict[int, float]]:
    """Return the same by a plain loop: norms and their buffers stay personal, the rest is averaged by n_k."""
    model = norm_model()
    states = {client: leaves(model.state_dict()) for client in range(len(BIG))}
    optimizers: dict[int, Any] = {}
    for round in range(3):
        for client in states:
            model.load_state_dict(states[client])
            optimizer = momentum(model.parameters())
            if round and client_optimizer_state == "keep":
                optimizer.load_state_dict(optimizers[client])
            plain_epoch(model, optimizer, client, round)
            states[client], optimizers[client] = leaves(model.state_dict()), optimizer.state_dict()
        for name in (name for name in model.state_dict() if not is_norm(name)):
            mean = torch.stack([states[c][name] * (size / sum(BIG)) for c, size in enumerate(BIG)]).sum(0)
            states = {client: state | {name: mean} for client, state in states.items()}
    return states, {client: accuracy(model, state, client) for client, state in states.items()}


def plain_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, client: int, epoch: int) -> None:
    """Train on all batches of the client, which are full."""
    model.train()
    batches = BIG[client] // BATCH_SIZE
    for number in range(epoch * batches, (epoch + 1) * batches):
        ids = EDGES[client] + batch_of(np.arange(BIG[client]), client, number, BATCH_SIZE)
        inputs, targets = tiny_data(sum(BIG)).train.fetch(torch.from_numpy(ids))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def accuracy(model: nn.Module, state: dict[str, Tensor], client: int) -> float:
    """Return the accuracy of a client's model on its test examples."""
    model.load_state_dict(state)
    inputs, targets = tiny_data(sum(BIG)).test.fetch(torch.arange(client, TEST_EXAMPLES, len(BIG)))
    return model.eval()(inputs).argmax(1).eq(targets).double().mean().item()


@pytest.mark.parametrize("client_optimizer_state", ["reset", "keep"])
def test_fedbn_is_a_plain_loop_that_keeps_norms_apart(ranks, client_optimizer_state: str):
    """Parameters, running buffers and counters of all clients' models are equal; each is evaluated on its own model."""
    outcomes = ranks(2).run(clients_models, client_optimizer_state)
    ours = {client: state for models, _ in outcomes for client, state in models.items()}
    # It runs on a rank, where torch has one thread.
    states, accuracies = ranks(2).run(plain_fedbn, client_optimizer_state)[0]
    assert sorted(ours) == sorted(states)
    for client, state in states.items():
        assert_close(ours[client], state)
        assert outcomes[0][1][f"client/{client}/test_accuracy"] == pytest.approx(accuracies[client])
    assert not torch.equal(ours[0]["norm.weight"], ours[1]["norm.weight"])


# BatchNorm's statistics


def plain_mean(parts: list[tuple[float, Statistics]]) -> Statistics:
    """Return the mean sum p m and the variance sum p v, without the variance of the means that `pooled` has."""
    shares = np.array([weight for weight, _ in parts])
    means, variances, counts = (np.stack(column) for column in zip(*(part for _, part in parts), strict=True))
    return np.average(means, 0, shares), np.average(variances, 0, shares), counts.max()


def statistics(combine: Callable[..., Statistics], silos: SiloSpec, rounds: int) -> Statistics:
    """Return the global statistics after some rounds of one epoch."""
    inputs = tiny_data(sum(BIG)).train.fetch(torch.arange(sum(BIG)))[0].numpy()
    state: Statistics = (np.zeros(FEATURES), np.ones(FEATURES), 0)
    for epoch in range(rounds):
        parts = []
        for client, replicas in replicas_by_client(silos).items():
            order = torch.randperm(BIG[client], generator=generator(0, "order", client, epoch)).numpy()
            mine = inputs[EDGES[client] : EDGES[client + 1]][order]
            parts += [(BIG[client] / replicas, replica_statistics(mine, state, r, replicas)) for r in range(replicas)]
        state = combine(parts)
    return state


@pytest.mark.parametrize("silos", [4, [3, 1]], ids=["4", "3+1"])
@pytest.mark.parametrize("name", ["mean", "pooled"])
def test_statistics_are_combined_as_they_are_called(ranks, name: Any, silos: SiloSpec):
    """After two rounds the two methods differ by the variance of the means."""
    choices = norm_choices(rounds=2, algorithm=FedAvg(batchnorm_stats=name))
    expected = {"mean": statistics(plain_mean, silos, 2), "pooled": statistics(pooled, silos, 2)}
    assert (expected["pooled"][1] > expected["mean"][1] + 1e-6).all()
    for ours in ranks(4).run(train, "fedavg", silos, choices):
        assert_statistics(ours.model, expected[name])


def test_a_client_whose_statistics_are_not_finite_is_left_out(ranks):
    """An input of 1e25 has an infinite variance in float32, but a finite delta, because it is normalised to 0."""
    data = tiny_data(sum(BIG), torch.float32)
    inputs, targets = data.train.fetch(torch.arange(sum(BIG)))
    inputs[EDGES[3], 2] = 1e25
    spoilt = DataSplits(TensorSource(inputs, targets), data.test, CLASSES)
    choices = norm_choices(module=norm_first(torch.float32), data=spoilt, rounds=2)
    ours = ranks(2).run(train, "fedavg", 2, choices)[0]
    assert all(bool(tensor.isfinite().all()) for tensor in ours.model.values())
    assert [metrics["clients/nonfinite"] for metrics in ours.rounds] == [1, 1]
