"""Clients with quadratic losses of different curvature, whose every step numpy can compute.

f_k(w) = 1/2 (w - b_k)^T A_k (w - b_k). All examples of a client are the same, so any batch of them has the full
gradient, and in an epoch clients differ only by their numbers of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.laws.cases import SIZES, Outcome, case_run, one_round, outcome
from tests.laws.test_equivalences import HalfSquares
from trainer.algorithms import Algorithm
from trainer.data import DataSplits, TensorSource
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.options import RoundOptions
from trainer.loop.train_state import TrainState

DIMENSIONS, RATE, EPOCHS, BATCH_SIZE = 5, 0.2, 1, 4
STEPS = [EPOCHS * -(-size // BATCH_SIZE) for size in SIZES]
EVERYONE = tuple(range(len(SIZES)))
START = np.full(DIMENSIONS, 4.0)


@dataclass(frozen=True)
class Bowls:
    """The roots R_k [clients, d, d] of the curvatures A_k = R_k^T R_k, and the centres b_k [clients, d]."""

    roots: np.ndarray
    centres: np.ndarray

    def gradient(self, client: int, place: np.ndarray) -> np.ndarray:
        """Return A_k (w - b_k)."""
        return self.roots[client].T @ self.roots[client] @ (place - self.centres[client])

    def optimum(self, weights: Sequence[float], decay: float = 0.0) -> np.ndarray:
        """Return the minimum of sum_k p_k f_k(w) + decay / 2 |w|^2, for p_k in proportion to the weights."""
        shares = np.array(weights) / sum(weights)
        curvatures = np.einsum("k,kji,kjl->kil", shares, self.roots, self.roots)
        slope = np.einsum("kij,kj->i", curvatures, self.centres)
        return np.linalg.solve(curvatures.sum(0) + decay * np.eye(DIMENSIONS), slope)

    def moved(self, client: int, centre: Any) -> Bowls:
        """Return these bowls with another centre for one client."""
        centres = self.centres.copy()
        centres[client] = centre
        return replace(self, centres=centres)

    def data(self) -> DataSplits:
        """Return n_k examples [R_k | b_k] of every client."""
        examples = np.concatenate([self.roots, self.centres[:, :, None]], 2).repeat(SIZES, 0)
        source = TensorSource(torch.from_numpy(examples), torch.zeros(len(examples), dtype=torch.int64))
        return DataSplits(source, source, None)


def made_up_bowls() -> Bowls:
    """Return bowls with random axes, curvatures from 1/2 to 2 along them, and centres far from each other."""
    random = np.random.default_rng(3)
    turned = np.stack([np.linalg.qr(random.normal(size=(DIMENSIONS, DIMENSIONS)))[0] for _ in SIZES])
    lengths = np.sqrt(random.uniform(0.5, 2.0, size=(len(SIZES), DIMENSIONS)))
    return Bowls(lengths[:, :, None] * turned, 3 * random.normal(size=(len(SIZES), DIMENSIONS)))


BOWLS = made_up_bowls()


class Place(nn.Module):
    """A point in space; its outputs R (w - b) have f as half their square."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.from_numpy(START.copy()))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("nij,nj->ni", inputs[..., :-1], self.place - inputs[..., -1])


@dataclass(frozen=True)
class Walk:
    """SGD by hand: g <- gradient + pull (w - x) + bend; b <- momentum b + g; w <- w - rate (b, or g + momentum b)."""

    rate: float = RATE
    momentum: float = 0.0
    nesterov: bool = False
    pull: float = 0.0

    def delta(
        self,
        client: int,
        start: np.ndarray,
        bowls: Bowls = BOWLS,
        bend: np.ndarray | float = 0.0,
        factors: Sequence[float] | None = None,
    ) -> np.ndarray:
        """Return start minus end of a client's round; `bend` is added to its gradients, `factors` scale the rates."""
        place, velocity = start, np.zeros(DIMENSIONS)
        for factor in factors or [1.0] * STEPS[client]:
            gradient = bowls.gradient(client, place) + self.pull * (place - start) + bend
            velocity = self.momentum * velocity + gradient
            move = gradient + self.momentum * velocity if self.nesterov else velocity
            place = place - self.rate * factor * move
        return start - place

    def deltas(self, start: np.ndarray, clients: Sequence[int] = EVERYONE, bowls: Bowls = BOWLS) -> np.ndarray:
        """Return the deltas of several clients [clients, d]."""
        return np.stack([self.delta(client, start, bowls) for client in clients])

    def optimizer(self) -> Any:
        """Return the same optimizer in torch."""
        return partial(torch.optim.SGD, lr=self.rate, momentum=self.momentum, nesterov=self.nesterov)


def bowl_choices(walk: Walk | None = None, bowls: Bowls = BOWLS, **choices: Any) -> dict[str, Any]:
    """Return the choices of a run of these clients that is evaluated only at the end."""
    defaults = {
        "module": Place(),
        "task": HalfSquares(),
        "data": bowls.data(),
        "optimizer": (walk or Walk()).optimizer(),
        "batch_size": BATCH_SIZE,
        "round": RoundOptions(epochs=EPOCHS),
        "eval.every_rounds": 1000,
        "metrics.per_client": "none",
    }
    return defaults | choices


def trajectory(silos: SiloSpec, algorithm: Callable[[], Algorithm], choices: Mapping[str, Any]) -> list[Outcome]:
    """Return the state on this rank after each round of such a run."""
    with distributed(silos) as topology:
        state = TrainState(case_run(topology, "fedavg", {**choices, "algorithm": algorithm()}))
        return [outcome(state, [one_round(state, index)]) for index in range(state.run.rounds)]


def path(silos: SiloSpec, algorithm: Callable[[], Algorithm], choices: Mapping[str, Any]) -> np.ndarray:
    """Return the global points after each round of such a run [rounds, d]."""
    return np.stack([one.model["place"].numpy() for one in trajectory(silos, algorithm, choices)])
