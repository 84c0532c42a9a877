"""Reddi et al. 2021's server optimizers against ten lines of numpy, in whole runs of a linear softmax model; blocks.

The server optimizers of torch are in test_references.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.laws.cases import COMBINED, Outcome, assert_same, train
from tests.laws.test_references import assert_is_reference, linear_choices, reference, sgd, start
from trainer.algorithms import FedAvg, FedOpt
from trainer.models import flat

CHOICES: dict[str, dict[str, Any]] = {
    "adagrad": {"rule": "adagrad", "lr": 0.1, "betas": (0.0, 0.99), "tau": 0.01},
    "adagrad_momentum": {"rule": "adagrad", "lr": 0.1, "betas": (0.9, 0.99), "tau": 0.01},
    "adam": {"rule": "adam", "lr": 0.05, "betas": (0.9, 0.99), "tau": 0.001},
    "yogi": {"rule": "yogi", "lr": 0.05, "betas": (0.9, 0.99), "tau": 0.1},
    "yogi_fast": {"rule": "yogi", "lr": 0.05, "betas": (0.5, 0.3), "tau": 0.1},
}


def fedopt(weights: np.ndarray, rule: str, lr: float, betas: tuple[float, float], tau: float):
    """Yield the weights after each mean delta sent: Reddi et al.

    2021, algorithm 2, with Delta = -delta, v_-1 = tau^2.
    """
    mean, square = np.zeros_like(weights), np.full_like(weights, tau**2)
    while True:
        delta = -(yield weights)
        mean = betas[0] * mean + (1 - betas[0]) * delta
        if rule == "adagrad":
            square = square + delta**2
        elif rule == "yogi":
            square = square - (1 - betas[1]) * delta**2 * np.sign(square - delta**2)
        else:
            square = betas[1] * square + (1 - betas[1]) * delta**2
        weights = weights + lr * mean / (np.sqrt(square) + tau)


def reported(server: Any, weight: str) -> list[tuple[np.ndarray, dict[str, float]]]:
    """Return the results of numpy for all rounds."""
    return list(reference(server(start()), weight))


@pytest.mark.parametrize("weight", ["examples", "equal"])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.quick_rows(4)
def test_fedopt_is_algorithm_2(ranks, name: str, weight: Any):
    """Five rounds of two epochs: 7 clients on 2 silos, batches of 4 and ragged ones."""
    algorithm = FedAvg(server=partial(FedOpt, **CHOICES[name]), weighting=weight)
    ours = ranks(2).run(train, "fedavg", 2, linear_choices("average") | {"algorithm": algorithm})[0]
    assert_is_reference(ours, reported(partial(fedopt, **CHOICES[name]), weight))
    server = {key.removeprefix("server/0/0/") for key in ours.algorithm if not key.endswith("/length")}
    assert server == {"mean", "square"}


@pytest.mark.parametrize("silos", [[3, 1], [2, 1, 1]], ids=["3+1", "2+1+1"])
def test_fedopt_on_silos_of_any_sizes(ranks, silos: list[int]):
    """All ranks have the same bits, and the numbers of the reference."""
    algorithm = FedAvg(server=partial(FedOpt, **CHOICES["yogi"]))
    outcomes = ranks(4).run(train, "fedavg", silos, linear_choices("average") | {"algorithm": algorithm})
    assert_is_reference(outcomes[0], reported(partial(fedopt, **CHOICES["yogi"]), "examples"))
    assert all(torch.equal(one.model["weight"], outcomes[0].model["weight"]) for one in outcomes)


def test_the_deltas_of_these_runs_take_yogi_both_ways():
    """d^2 is above v in some places and below it in others; otherwise the sign in Yogi's rule would not be tested."""
    choices = CHOICES["yogi"]
    first = reported(partial(sgd, lr=1.0), "examples")[0][0] - start()
    above = first**2 > choices["tau"] ** 2
    assert above.any() and not above.all()


def test_adagrad_of_a_large_tau_is_fedavg(ranks):
    """With sqrt(v) = tau to rounding and no momentum, w moves by lr d / (2 tau): at lr = 2 tau, by d."""
    servers = [partial(FedOpt, rule="adagrad", lr=2e9, betas=(0.0, 0.0), tau=1e9), partial(torch.optim.SGD, lr=1.0)]
    choices = [linear_choices("average") | {"algorithm": FedAvg(server=server)} for server in servers]
    ours, theirs = (ranks(2).run(train, "fedavg", 2, of)[0] for of in choices)
    torch.testing.assert_close(ours.model["weight"], theirs.model["weight"], rtol=1e-12, atol=1e-12)


def train_in_blocks(name: str, choices: dict[str, Any]) -> Outcome:
    """Train a run whose vectors have several blocks."""
    with patch.object(flat, "BLOCK", 16):
        return train(name, 2, choices)


@pytest.mark.parametrize("name", [name for name in COMBINED if name != "bounded"])
@pytest.mark.quick_rows(7)
def test_the_blocks_of_a_vector_do_not_show(ranks, name: str):
    """The bits are those of a run with one block, unless a norm is used, whose rounding differs."""
    blocks, whole = ranks(2).run(train_in_blocks, name, {"rounds": 3}), ranks(2).run(train, name, 2, {"rounds": 3})
    for one, other in zip(blocks, whole, strict=True):
        assert_same(one.model, other.model)
