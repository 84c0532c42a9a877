"""SCAFFOLD and FedNova against their papers: their limits, and every step on the way, as computed by numpy.

Clients are quadratics of different curvature that take unequal numbers of steps: FedAvg ends elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.laws.cases import SIZES, Only, assert_close, every_client, fednova, scaffold
from tests.laws.quadratics import (
    BOWLS,
    DIMENSIONS,
    EVERYONE,
    RATE,
    START,
    STEPS,
    Walk,
    bowl_choices,
    path,
    trajectory,
)
from trainer.algorithms import Algorithm, FedAvg
from trainer.data.client_sampling.sampling import AllClients, ClientSampler, UniformSampler
from trainer.distributed.silos import SiloSpec
from trainer.loop.options import RoundOptions
from trainer.optim.schedules import Constant, Cosine, Schedule

EQUAL, RHO, MU = [1] * len(SIZES), 0.9, 0.7
PLAIN, MOMENTUM, NESTEROV = Walk(), Walk(0.05, RHO), Walk(0.05, RHO, nesterov=True)
PROXIMAL = Walk(pull=MU)
COSINE = Cosine(final_lr_fraction=0.1)
COHORTS: dict[str, ClientSampler] = {"all": AllClients(), "sampled": UniformSampler(4)}
ROUNDS = {"all": 40, "sampled": 50}
WEIGHTS = {"examples": SIZES, "equal": EQUAL}

cohorts = pytest.mark.parametrize("cohort", COHORTS)
weights = pytest.mark.parametrize("weight", WEIGHTS)
ways_to_step = pytest.mark.parametrize(
    ("walk", "schedule"),
    [(PLAIN, Constant()), (MOMENTUM, Constant()), (NESTEROV, Constant()), (PLAIN, COSINE)],
    ids=["sgd", "momentum", "nesterov", "cosine"],
)


def reached(ranks: Any, algorithm: Callable[[], Algorithm], choices: dict[str, Any]) -> np.ndarray:
    """Return the end point of a run on two silos."""
    return ranks(2).run(path, 2, algorithm, choices)[0][-1]


def distance(place: np.ndarray, optimum: np.ndarray) -> float:
    return float(np.abs(place - optimum).max())


@pytest.mark.parametrize(("weight", "cohort"), [("examples", "all"), ("equal", "all"), ("examples", "sampled")])
@ways_to_step
@pytest.mark.quick_rows(2)
def test_scaffold_reaches_the_optimum_and_fedavg_does_not(
    ranks, walk: Walk, schedule: Schedule, weight: Any, cohort: str
):
    """The optimum is that of sum_k p_k f_k: with p_k = n_k / n or 1 / K, and all clients or 4 of 7 a round.

    FedAvg is kept away by its bias, and by the noise of client sampling.
    """
    choices = bowl_choices(walk, rounds=ROUNDS[cohort], client_sampling=COHORTS[cohort], schedule=schedule)
    optimum = BOWLS.optimum(WEIGHTS[weight])
    assert distance(reached(ranks, partial(scaffold, weighting=weight), choices), optimum) < 1e-6
    assert distance(reached(ranks, partial(FedAvg, weighting=weight), choices), optimum) > 1e-2


def test_scaffold_with_weight_decay_reaches_the_optimum_with_it(ranks):
    """Decay is a part of every client's gradient, so the optimum is that of sum_k p_k f_k + decay / 2 |w|^2."""
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=RHO, weight_decay=0.3)
    ours = reached(ranks, scaffold, bowl_choices(optimizer=optimizer, rounds=40))
    assert distance(ours, BOWLS.optimum(SIZES, decay=0.3)) < 1e-6
    assert distance(ours, BOWLS.optimum(SIZES)) > 1e-2


def momentum_norm(steps: int) -> float:
    """Return ||a||_1 of tau steps with momentum: (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho), Wang et al.

    2020.
    """
    return (steps - RHO * (1 - RHO**steps) / (1 - RHO)) / (1 - RHO)


def factors(schedule: Schedule, client: int, round: int) -> list[float]:
    """Return the factors on the learning rates of the client's steps in a round of five."""
    return [schedule((round + step / STEPS[client]) / 5) for step in range(STEPS[client])]


def way(walk: Walk, factors: list[float]) -> float:
    """Return the sum of the rates; eta ||a||_1 with momentum, eta (tau + rho ||a||_1) with Nesterov's."""
    steps = len(factors)
    if walk.nesterov:
        return walk.rate * (steps + RHO * momentum_norm(steps))
    return walk.rate * (momentum_norm(steps) if walk.momentum else sum(factors))


Told = tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]


def scaffold_by_hand(walk: Walk, schedule: Schedule, cohort: ClientSampler, shares: np.ndarray) -> Iterator[Told]:
    """Yield x, c and the known c_k after each of five rounds: Karimireddy et al. 2020, algorithm 1, option II.

    With equal shares 1 / N they are the paper's means: c moves by |S| / N times the mean change. K eta_l is the `way`.
    """
    x, c, controls = START, np.zeros(DIMENSIONS), {}
    for round in range(5):
        members = cohort.sample(len(SIZES), 0, round)
        x_change, c_change = np.zeros(DIMENSIONS), np.zeros(DIMENSIONS)
        for k in members:
            control, rates = controls.get(k, np.zeros(DIMENSIONS)), factors(schedule, k, round)
            delta = walk.delta(k, x, bend=c - control, factors=rates)
            controls[k] = control - c + delta / way(walk, rates)
            x_change += shares[k] / shares[list(members)].sum() * delta
            c_change += shares[k] * (controls[k] - control)
        x, c = x - x_change, c + c_change
        yield x, c, dict(controls)


@cohorts
@weights
@pytest.mark.parametrize(
    ("walk", "schedule", "silos"),
    [
        (PLAIN, Constant(), 2),
        (PLAIN, Constant(), [3, 1]),
        (MOMENTUM, Constant(), 2),
        (NESTEROV, Constant(), 2),
        (PLAIN, COSINE, 2),
    ],
    ids=["sgd", "sgd-3+1", "momentum", "nesterov", "cosine"],
)
@pytest.mark.quick_rows(6)
def test_scaffold_is_algorithm_1_option_2(
    ranks, walk: Walk, schedule: Schedule, silos: SiloSpec, weight: Any, cohort: str
):
    """The global parameters, the server's control variate and the clients' ones, after each of five rounds."""
    choices = bowl_choices(walk, rounds=5, client_sampling=COHORTS[cohort], schedule=schedule)
    by_rank = ranks(2 if silos == 2 else 4).run(trajectory, silos, partial(scaffold, weighting=weight), choices)
    shares = np.array(WEIGHTS[weight]) / sum(WEIGHTS[weight])
    expected = list(scaffold_by_hand(walk, schedule, COHORTS[cohort], shares))
    for outcomes, (x, c, controls) in zip(zip(*by_rank, strict=True), expected, strict=True):
        assert_close(outcomes[0].model, {"place": x})
        np.testing.assert_allclose(outcomes[0].algorithm["control"][:DIMENSIONS], c, rtol=1e-12, atol=1e-12)
        kept = {k: state["algorithm/control"][:DIMENSIONS] for k, state in every_client(list(outcomes)).items()}
        assert_close(kept, controls)


def test_the_first_round_of_scaffold_is_that_of_fedavg(ranks):
    """All control variates are still 0."""
    ours, theirs = (reached(ranks, algorithm, bowl_choices(rounds=1)) for algorithm in (scaffold, FedAvg))
    assert np.array_equal(ours, theirs)


def plain_norm(steps: int) -> float:
    """Return ||a||_1 of plain SGD: tau."""
    return steps


def proximal_norm(steps: int) -> float:
    """Return ||a||_1 with a proximal term: (1 - (1 - eta mu)^tau) / (eta mu)."""
    return (1 - (1 - RATE * MU) ** steps) / (RATE * MU)


NORMS: dict[str, tuple[Walk, Callable[[int], float]]] = {
    "vanilla": (PLAIN, plain_norm),
    "momentum": (MOMENTUM, momentum_norm),
    "proximal": (PROXIMAL, proximal_norm),
}


def fednova_by_hand(name: str, members: tuple[int, ...], weight: str, momentum: float) -> Iterator[np.ndarray]:
    """Yield x after each of three rounds: x <- x - tau_eff sum_i p_i eta d_i, d_i = (x - y_i) / (eta ||a_i||_1).

    With tau_eff = sum_i p_i ||a_i||_1, Wang et al. 2020, equation 6; a server with momentum moves by its velocity.
    """
    (walk, norm), x, velocity = NORMS[name], START, np.zeros(DIMENSIONS)
    shares = np.array([WEIGHTS[weight][k] for k in members])
    shares = shares / shares.sum()
    norms = np.array([norm(STEPS[k]) for k in members])
    for _ in range(3):
        directions = walk.deltas(x, members) / (walk.rate * norms[:, None])
        velocity = momentum * velocity + shares @ norms * walk.rate * (shares @ directions)
        x = x - velocity
        yield x


@weights
@pytest.mark.parametrize("silos", [2, [3, 1]], ids=["2", "3+1"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.quick_rows(4)
def test_fednova_is_its_formula(ranks, name: str, silos: SiloSpec, weight: Any):
    """Clients take 1 to 5 steps a round; the norms of a are the paper's closed forms, ours are measured."""
    walk = NORMS[name][0]
    algorithm = partial(fednova, weighting=weight, proximal_mu=walk.pull)
    pool = ranks(2 if silos == 2 else 4)
    ours = pool.run(path, silos, algorithm, bowl_choices(walk, rounds=3))[0]
    np.testing.assert_allclose(ours, list(fednova_by_hand(name, EVERYONE, weight, 0)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_fednova_of_some_clients_with_a_momentum_server_is_its_formula(ranks, name: str):
    """tau_eff is the mean over the four sampled clients."""
    walk, members = NORMS[name][0], (0, 2, 3, 6)
    server = partial(torch.optim.SGD, lr=1.0, momentum=0.5)
    choices = bowl_choices(walk, rounds=3, client_sampling=Only((members,)))
    ours = ranks(2).run(path, 2, partial(fednova, server=server, proximal_mu=walk.pull), choices)[0]
    np.testing.assert_allclose(ours, list(fednova_by_hand(name, members, "examples", 0.5)), rtol=1e-12, atol=1e-12)


def test_fednova_of_equal_numbers_of_steps_is_fedavg(ranks):
    """All a_k are equal, and cancel out."""
    choices = bowl_choices(rounds=3, round=RoundOptions(steps=4))
    ours, theirs = (reached(ranks, algorithm, choices) for algorithm in (fednova, FedAvg))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
