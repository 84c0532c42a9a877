"""Clients that differ: joining and leaving, drawn numbers of epochs, and post-local SGD."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.laws.cases import (
    SIZES,
    assert_close,
    every_client,
    scaffold,
    tiny_data,
    tiny_model,
    train,
)
from tests.laws.heterogeneity import (
    EVERYONE,
    START,
    STEPS,
    WEIGHTS,
    assert_same_run,
    point_choices,
    reported,
    walk,
    way,
)
from tests.laws.test_equivalences import batch_of
from tests.laws.test_resume import assert_bit_equal, noisy_choices
from trainer.algorithms import FedAvg
from trainer.algorithms.round import Round
from trainer.data.client_sampling.sampling import AvailabilityTrace, UniformSampler
from trainer.loop.options import RoundOptions

TRACE = "round, client, event\n1, 2, join\n1, 4, join\n2, 2, leave\n2, 4, leave\n3, 1, leave\n3, 4, join\n3, 6, join\n"
MEMBERS = [[0, 1, 2, 3, 4, 5], [0, 1, 3, 5], [0, 3, 4, 5, 6], [0, 2, 3, 4, 5, 6], [0, 2, 3, 4, 5, 6]]


@pytest.fixture
def trace(tmp_path: Path) -> AvailabilityTrace:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE + "4, 2, join\n")
    return AvailabilityTrace(file)


def traced(controls: bool, keeps: bool) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return the point after the rounds of the trace, and each client's control variate and velocity [clients, 3]."""
    place, control, own, velocities = START, np.zeros(3), np.zeros((7, 3)), np.zeros((7, 3))
    for members in MEMBERS:
        bends = (control - own) * controls
        walks = [walk(client, place, velocities[client] * keeps, bends[client]) for client in members]
        ends, velocities[members] = (np.stack(column) for column in zip(*walks, strict=True))
        changes = (place - ends) / way(STEPS) - control
        own[members] += changes
        control = control + WEIGHTS[members] @ changes
        place = WEIGHTS[members] @ ends / WEIGHTS[members].sum()
    return place, own, velocities


@pytest.mark.parametrize(
    ("algorithm", "state"),
    [(FedAvg(), None), (scaffold(), "algorithm/control"), (FedAvg(client_optimizer_state="keep"), "momentum_buffer")],
    ids=["fedavg", "scaffold", "keep"],
)
def test_who_comes_back_goes_on_with_what_it_had(ranks, trace: AvailabilityTrace, algorithm: FedAvg, state: str | None):
    """Control variates and momentum of absent clients do not change: five rounds equal those of numpy."""
    ours = ranks(2).run(
        train, "fedavg", 2, point_choices(algorithm=algorithm, client_sampling=trace, rounds=len(MEMBERS))
    )
    place, own, velocities = traced(controls=algorithm.drift_correction is not None, keeps=state == "momentum_buffer")
    assert reported(ours, "clients/trained") == list(map(len, MEMBERS))
    np.testing.assert_allclose(ours[0].model["inner.place"], place, rtol=1e-12)
    kept = every_client(ours)
    assert set(kept) == (set(EVERYONE) if state else set())
    for client, tensors in kept.items():
        (tensor,) = (leaf for name, leaf in tensors.items() if name.endswith(str(state)))
        np.testing.assert_allclose(
            tensor[:3], (velocities if algorithm.client_optimizer_state == "keep" else own)[client], 1e-12
        )


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "diloco"])
def test_a_resumed_run_finds_those_who_were_away(ranks, trace: AvailabilityTrace, name: str, tmp_path: Path):
    """It is saved while clients 2 and 4 are absent; both return later."""
    assert_bit_equal(ranks(2), name, 2, noisy_choices(name) | {"client_sampling": trace}, tmp_path / "runs")


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fednova", "diloco"])
@pytest.mark.quick_rows(2)
def test_clients_do_the_epochs_that_are_drawn(ranks, name: str):
    """With 5 of 7 clients, the result is the same on 1, 2 and 4 processes, and in silos of 3 and 1."""
    length, cohort = RoundOptions(epochs=(1, 3)), UniformSampler(5)
    choices = {"round": length, "client_sampling": cohort, "rounds": 4}
    drawn = [{k: length.num_steps(1, Round(i, 0, ()), k) for k in cohort.sample(7, 0, i)} for i in range(4)]
    one = ranks(1).run(train, name, 1, choices)
    assert reported(one, "round/examples") == [sum(SIZES[k] * epochs for k, epochs in round.items()) for round in drawn]
    for size, silos in ((2, 2), (4, 4), (4, [3, 1])):
        many = ranks(size).run(train, name, silos, choices)
        assert reported(many, "round/examples") == reported(one, "round/examples")
        assert_same_run(many, one, assert_close)


# Post-local SGD


def step(model: nn.Module, optimizer: torch.optim.Optimizer, clients: Sequence[int], number: int) -> None:
    """Take a step on the batches of this number, 4 examples of each of the clients, which have 12."""
    ids = [batch_of(np.arange(12 * client, 12 * client + 12), client, number, 4) for client in clients]
    inputs, targets = tiny_data(48).train.fetch(torch.from_numpy(np.concatenate(ids)))
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def test_steps_together_and_then_apart(ranks):
    """Three rounds are momentum SGD on the union of the batches; three more have 4 steps of each client alone.

    The mean of the clients' velocities m v_k + g_k is that of SGD on the union, as long as their models are the same.
    """
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    choices = {
        "sizes": [12] * 4,
        "data": tiny_data(48),
        "optimizer": sgd,
        "round": RoundOptions(steps=4, sync_rounds=3),
    }
    choices |= {"algorithm": FedAvg(weighting="equal", client_optimizer_state="keep")}
    union, models = tiny_model().double(), [tiny_model().double() for _ in range(4)]
    optimizer, optimizers = sgd(union.parameters()), [sgd(model.parameters()) for model in models]
    for number in range(3):
        step(union, optimizer, range(4), number)
    for numbers in ([0], [1], [2], range(3, 7), range(7, 11), range(11, 15)):
        for client, number in ((client, number) for client in range(4) for number in numbers):
            step(models[client], optimizers[client], [client], number)
        mean = {name: torch.stack([m.state_dict()[name] for m in models]).mean(0) for name in union.state_dict()}
        for model in models:
            model.load_state_dict(mean)
    for rounds, expected in ((3, union.state_dict()), (6, mean)):
        ours = ranks(2).run(train, "fedavg", 2, choices | {"rounds": rounds})[0]
        assert_close(ours.model, expected)
        assert [metrics["round/steps"] for metrics in ours.rounds] == [4, 4, 4, 16, 16, 16][:rounds]
