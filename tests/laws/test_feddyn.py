"""FedDyn against its paper: every round is that of numpy, and it reaches the optimum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from tests.laws.cases import SIZES, assert_close, every_client
from tests.laws.quadratics import BOWLS, DIMENSIONS, START, Walk, bowl_choices, path, trajectory
from trainer.algorithms import FedAvg, FedDyn
from trainer.data.client_sampling.sampling import ClientSampler, UniformSampler
from trainer.distributed.silos import SiloSpec

ALPHA, CLIENTS, ROUNDS = 1.5, 3, 6

feddyn = partial(FedAvg, weighting="equal", drift_correction=FedDyn(ALPHA))
Expected = tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]


def feddyn_by_hand(sampler: ClientSampler) -> Iterator[Expected]:
    """Yield w, h and the l_k of all clients seen, after each round: Acar et al. 2021, algorithm 1."""
    w, h, lagrangians = START, np.zeros(DIMENSIONS), {}
    for round in range(ROUNDS):
        ends = {}
        for k in sampler.sample(CLIENTS, 0, round):
            # SGD on g - l_k + alpha (w_k - w); `delta` is w - w_k.
            lagrangian = lagrangians.get(k, np.zeros(DIMENSIONS))
            ends[k] = w - Walk(pull=ALPHA).delta(k, w, bend=-lagrangian)
            lagrangians[k] = lagrangian - ALPHA * (ends[k] - w)
        h = h - ALPHA / CLIENTS * sum(end - w for end in ends.values())
        w = sum(ends.values()) / len(ends) - h / ALPHA
        yield w, h, dict(lagrangians)


@pytest.mark.parametrize(("size", "silos"), [(1, 1), (2, 2), (4, [3, 1])], ids=["1", "2", "3+1"])
def test_feddyn_is_algorithm_1(ranks, size: int, silos: SiloSpec):
    """The global parameters, the server's state and the clients' states in float64, with 2 of 3 clients a round."""
    sampler = UniformSampler(2)
    choices = bowl_choices(rounds=ROUNDS, sizes=SIZES[:CLIENTS], client_sampling=sampler)
    by_rank = ranks(size).run(trajectory, silos, feddyn, choices)
    for outcomes, (w, h, lagrangians) in zip(zip(*by_rank, strict=True), feddyn_by_hand(sampler), strict=True):
        assert_close(outcomes[0].model, {"place": w})
        # `drift` is the paper's h / alpha.
        np.testing.assert_allclose(outcomes[0].algorithm["drift"][:DIMENSIONS], h / ALPHA, rtol=1e-12, atol=1e-12)
        kept = {k: one["algorithm/lagrangian"][:DIMENSIONS] for k, one in every_client(list(outcomes)).items()}
        assert_close(kept, lagrangians)
    assert len(lagrangians) == CLIENTS


def test_feddyn_reaches_the_optimum_and_fedavg_does_not(ranks):
    """Clients take unequal numbers of steps, so the mean of their updates is zero at another point."""
    optimum = BOWLS.optimum([1] * len(SIZES))
    choices = bowl_choices(rounds=40)
    algorithms = (feddyn, partial(FedAvg, weighting="equal"))
    ends = [ranks(2).run(path, 2, algorithm, choices)[0][-1] for algorithm in algorithms]
    ours, theirs = (float(np.abs(end - optimum).max()) for end in ends)
    assert ours < 1e-6 and theirs > 1e-2
