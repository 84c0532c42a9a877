"""Merging the contributions of several silos equals one silo that trains all their clients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.laws.cases import CASES, SIZES, case_run
from trainer.algorithms.base import RoundSession
from trainer.distributed.topology import distributed
from trainer.loop.round import train_round
from trainer.loop.train_state import TrainState

ROUNDS = 3
BIT_EQUAL = ["fedavg", "fedprox", "fedavg_adam", "median", "krum"]
# The factors of a client's update are multiplied in another order.
CLOSE = ["bounded", "scaffold", "fednova", "feddyn", "averaging"]


def train_here(state: TrainState, client: int, index: int) -> tuple[RoundSession, float]:
    """Train a round of one client as if its silo were alone; return the session and the weight of the round."""
    round = replace(state.run.sample_round(index), cohort=(client,))
    session = state.algorithm.start_round(round)
    training = state.trainer.start_client(session, client)
    assert state.trainer.train(training, round, index, None, lambda client, action: False)
    _, kept = training.session.finish(training.result)
    state.trainer.commit(client, kept)
    return session, session.scalars()["weight"]


def merged(name: str) -> torch.Tensor:
    """Return the global parameters of a run in which each client has a silo with a separate state."""
    with distributed(device="cpu") as topology:
        states = [TrainState(case_run(topology, name, {"rounds": ROUNDS})) for _ in (*SIZES, "coordinator")]
        *silos, coordinator = states
        for index in range(ROUNDS):
            together = coordinator.algorithm.start_round(coordinator.run.sample_round(index))
            sums: dict[str, float] = {}
            for client, silo in enumerate(silos):
                silo.algorithm.load_global_state(coordinator.algorithm.global_state())
                session, weight = train_here(silo, client, index)
                together.merge(session.contribution(), weight)
                for key, value in session.scalars().items():
                    sums[key] = sums.get(key, 0.0) + value
            together.aggregate(sums)
        return coordinator.algorithm.global_state()["parameters"].clone()


def in_one_silo(name: str) -> torch.Tensor:
    """Return those of one silo that trains all clients, one after the other."""
    with distributed(device="cpu") as topology:
        state = TrainState(case_run(topology, name, {"rounds": ROUNDS}))
        for index in range(ROUNDS):
            assert train_round(state, state.run.sample_round(index))
        return state.algorithm.global_state()["parameters"].clone()


@pytest.mark.parametrize("name", BIT_EQUAL)
def test_merged_silos_are_one_silo(name: str):
    """Seven silos of one client equal one silo, bit for bit."""
    assert name in CASES
    assert torch.equal(merged(name), in_one_silo(name))


@pytest.mark.parametrize("name", CLOSE)
def test_merged_silos_are_one_silo_up_to_rounding(name: str):
    torch.testing.assert_close(merged(name), in_one_silo(name), rtol=1e-10, atol=1e-12)
