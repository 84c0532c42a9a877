"""Clients that are slow, and clients that numpy can follow.

The examples of slow clients say so: their last feature is the seconds that a step on them takes, on a clock that
otherwise stands still. So silos reach the deadline at the same step in every run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import (
    SIZES,
    Outcome,
    every_client,
    figures,
    tiny_data,
    tiny_model,
)
from tests.laws.test_equivalences import HalfSquares, Point
from trainer.algorithms.round import Round
from trainer.data import DataSplits, TensorSource
from trainer.loop import control, exchange, round
from trainer.loop.options import RoundOptions

EVERYONE = tuple(range(len(SIZES)))
SLOW, OTHER = 5, 6  # the last client of each of two silos
EDGES = np.cumsum([0, *SIZES])
STEPS, DONE = 4, 2  # the steps of a round, and those for which a slow client has time
DEADLINE = RoundOptions(steps=STEPS, deadline_seconds=DONE - 0.5)


class Clock:
    """A clock that advances by the seconds of slow steps, and by a microsecond when it is read."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


class Costly(nn.Module):
    """A model that takes as many seconds as the last feature says, on the simulated clock or on the real one."""

    def __init__(self, inner: nn.Module, by_wall: bool = False):
        super().__init__()
        self.inner, self.by_wall = inner, by_wall

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and len(inputs):
            (time.sleep if self.by_wall else CLOCK.pass_by)(float(inputs[:, -1].max()))
        return self.inner(inputs[:, :-1])


def by_clock(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function on a rank with the simulated clock, and with a vote of the replicas after each step."""
    votes = patch.object(control, "CONSENSUS_INTERVAL_SECONDS", 0.0)
    clocks = (patch.object(module, "perf_counter", CLOCK) for module in (control, round, exchange))
    with votes, ExitStack() as stack:
        for clock in clocks:
            stack.enter_context(clock)
        return function(*arguments)


@dataclass(frozen=True)
class Planned(RoundOptions):
    """Rounds in which some clients take the number of steps in `steps_of`, without a deadline."""

    steps_of: dict[int, int] = field(default_factory=dict)

    def num_steps(self, steps_per_epoch: int, round: Round, client: int) -> int:
        return self.steps_of.get(client, super().num_steps(steps_per_epoch, round, client))


def timed(data: DataSplits, sizes: Sequence[int], slow: Sequence[int], seconds: float = 1.0) -> DataSplits:
    """Add a feature to the data: the seconds of slow clients' training examples, 0 for all others."""
    taken = torch.tensor([seconds if client in slow else 0.0 for client in range(len(sizes))], dtype=torch.float64)
    columns = taken.repeat_interleave(torch.tensor(sizes)), taken.new_zeros(len(data.test))
    fetched = (source.fetch(torch.arange(len(source))) for source in (data.train, data.test))
    first, second = (
        TensorSource(torch.hstack([inputs, column[:, None]]), targets)
        for (inputs, targets), column in zip(fetched, columns, strict=True)
    )
    return DataSplits(first, second, data.classes)


def slow_choices(*slow: int, bad: int | None = None, **choices: Any) -> dict[str, Any]:
    """Return choices of a run with slow clients, and optionally with a client whose inputs are NaN."""
    data = tiny_data(sum(SIZES))
    inputs, targets = data.train.fetch(torch.arange(sum(SIZES)))
    if bad is not None:
        inputs[EDGES[bad] : EDGES[bad + 1], 2] = math.nan
    data = timed(DataSplits(TensorSource(inputs, targets), data.test, data.classes), SIZES, slow)
    defaults = {"module": Costly(tiny_model().double()), "data": data, "round": DEADLINE, "metrics.per_client": "none"}
    return defaults | choices


def without(*clients: int) -> tuple[int, ...]:
    return tuple(client for client in EVERYONE if client not in clients)


def assert_same_run(ours: list[Outcome], theirs: list[Outcome], compare: Callable[[Any, Any], None]) -> None:
    """Compare the model, the states of the server and the clients, and the metrics of losses and deltas."""
    compare(ours[0].model, theirs[0].model)
    compare(ours[0].algorithm, theirs[0].algorithm)
    kept, expected = every_client(ours), every_client(theirs)
    assert set(kept) == set(expected)
    for client in expected:
        compare(kept[client], expected[client])
    counts = ("round/", "clients/", "train/grad_norm")  # late clients did not take the last step
    for one, other in zip(ours[0].rounds, theirs[0].rounds, strict=True):
        judged = {name: value for name, value in figures(one).items() if not name.startswith(counts)}
        assert judged == pytest.approx({name: other[name] for name in judged}, rel=1e-9, nan_ok=True)


def reported(outcomes: list[Outcome], name: str) -> list[Any]:
    return [metrics[name] for metrics in outcomes[0].rounds]


RATE, MOMENTUM = 0.1, 0.5
POINTS = torch.randn(sum(SIZES), 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MEANS = [POINTS[first:last].mean(0).numpy() for first, last in pairwise(EDGES)]
START, WEIGHTS = np.full(3, 4.0), np.array(SIZES) / sum(SIZES)


def point_choices(*slow: int, **choices: Any) -> dict[str, Any]:
    """Return choices of clients that pull a point to the means of their examples, by full-batch SGD with momentum."""
    source = TensorSource(POINTS, torch.zeros(len(POINTS), dtype=torch.int64))
    data, sgd = (
        timed(DataSplits(source, source, None), SIZES, slow),
        partial(torch.optim.SGD, lr=RATE, momentum=MOMENTUM),
    )
    defaults = {"module": Costly(Point()), "task": HalfSquares(), "data": data, "batch_size": "all", "optimizer": sgd}
    return defaults | {"round": RoundOptions(steps=STEPS), "eval.every_rounds": 1000} | choices


def walk(client: int, place: Any, velocity: Any = 0.0, bend: Any = 0.0, steps: int = STEPS) -> tuple[Any, Any]:
    """Return the end point of a client, and its velocity: v <- momentum v + w - mean + bend; w <- w - rate v."""
    for _ in range(steps):
        velocity = MOMENTUM * velocity + place - MEANS[client] + bend
        place = place - RATE * velocity
    return place, velocity


def way(steps: int) -> float:
    """Return rate sum_i (1 - momentum^i) / (1 - momentum): the rate times FedNova's norm of a."""
    return RATE * sum((1 - MOMENTUM**step) / (1 - MOMENTUM) for step in range(1, steps + 1))
