"""Silos start equal, and replicas that have diverged are found on every rank before results are reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from tests.laws.cases import CASES, assert_same, case_run, leaves, silos_of, tiny_model
from trainer.data.client_sampling.sampling import UniformSampler
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop import round as loop_round
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions
from trainer.loop.train_state import TrainState


def odd_model(seed: int) -> nn.Module:
    """Return a model with parameters, batch statistics and a counter that depend on the seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(seed)
    return model


def start_apart(name: str, silos: SiloSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the start model of a rank that has built a different one, and the algorithm's copy of it."""
    with distributed(silos_of(name, silos)) as topology:
        run = case_run(topology, name, {"module": odd_model(seed=topology.rank + 1)})
        state = TrainState(run)
        return leaves(state.model.module.state_dict()), leaves(state.algorithm.global_state())


@pytest.mark.parametrize("name", ["sync", "fedavg", "local"])
@pytest.mark.quick_rows(1)
def test_silos_start_equal(ranks, name: str):
    """Parameters and buffers of all ranks are those of rank 0, whatever the others have built."""
    outcomes = ranks(4).run(start_apart, name, [3, 1])
    for model, algorithm in outcomes:
        assert_same(model, odd_model(seed=1).state_dict())
        assert_same(algorithm, outcomes[0][1])


@torch.no_grad()
def perturb(state: TrainState) -> None:
    """Add a little to one parameter."""
    next(state.model.module.parameters()).view(-1)[0] += 1e-9


def drift(name: str, silos: SiloSpec, culprit: int, when: str, choices: dict[str, Any]) -> str:
    """Return the error of `fit` on this rank after the culprit's model was perturbed; empty if there is none."""
    with distributed(silos_of(name, silos)) as topology:
        run = case_run(topology, name, choices)
        states: list[TrainState] = []

        def perturb_step(done: float, examples: int, loss: Callable[[], float]) -> None:
            perturb(states[0])

        on_step = perturb_step if topology.rank == culprit and when == "while training" else None
        perturbs = topology.rank == culprit and when == "after the combination"
        combine = loop_round.aggregate_round

        def combine_and_perturb(state: TrainState, *arguments: Any) -> Metrics | None:
            metrics = combine(state, *arguments)
            if perturbs:
                perturb(state)
            return metrics

        try:
            with patch.object(loop_round, "aggregate_round", combine_and_perturb):
                fit(run, on_step=on_step, on_start=states.append)
        except RuntimeError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("culprit", [1, 2])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_rows(7)
def test_a_replica_that_drifts_is_named(ranks, name: str, culprit: int):
    """In a silo of 3 one replica's parameters differ from those of the first: all 4 ranks stop, and name the rank."""
    message = ranks(4).run(drift, name, [3, 1], culprit, "while training", {})
    assert len(set(message)) == 1
    assert f"[{culprit}]" in message[0]


@pytest.mark.parametrize("culprit", [1, 3])
@pytest.mark.parametrize("name", [name for name in CASES if name != "local"])
@pytest.mark.quick_rows(7)
def test_a_global_model_that_drifts_is_named(ranks, name: str, culprit: int):
    """In silos of 3 and 1 ranks, the combined model of any rank may differ from that of rank 0."""
    message = ranks(4).run(drift, name, [3, 1], culprit, "after the combination", {})
    assert len(set(message)) == 1
    assert f"[{culprit}]" in message[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_rows(5)
def test_ranks_that_agree_are_left_alone(ranks, name: str):
    """Several rounds, in some of which a silo has no client, and not all of which are evaluated."""
    choices: dict[str, Any] = {"rounds": 4, "eval.every_rounds": 2}
    if name not in ("sync", "fedsgd"):
        choices |= {"client_sampling": UniformSampler(5 if name == "krum" else 1), "round": RoundOptions(steps=2)}
    assert ranks(4).run(drift, name, [3, 1], -1, "never", choices) == [""] * 4


def swap_parameters() -> str:
    """Exchange two rows of rank 1's first layer during training."""
    with distributed() as topology:
        run = case_run(topology, "sync", {"module": tiny_model().double()})
        states: list[TrainState] = []

        @torch.no_grad()
        def swap(done: float, examples: int, loss: Callable[[], float]) -> None:
            weight = next(states[0].model.module.parameters())
            if topology.rank == 1 and done == 1:
                weight.copy_(weight.flip(0))

        try:
            fit(run, on_step=swap, on_start=states.append)
        except RuntimeError as error:
            return str(error)
        return ""


def test_a_replica_with_the_same_numbers_in_other_places_is_found(ranks):
    """Vectors are compared, not sets of numbers."""
    for message in ranks(2).run(swap_parameters):
        assert "[1]" in message
