"""The two sides of a case: a round of the trainer with nothing but its steps, and a hand-written loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch

from scripts.bench.gpu.cases import Case
from trainer.algorithms import Sync
from trainer.data import Clients, DataSplits
from trainer.data.transforms import Compose
from trainer.distributed.topology import Topology
from trainer.loggers import Metrics
from trainer.loop.options import EvalOptions, MetricsOptions, RoundOptions, TrainingOptions
from trainer.loop.round import train_round
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.utils.compile import compile_module
from trainer.utils.timing import synchronized_time

FOREVER = 10**6


class Ours:
    """A run whose rounds are the windows; `figures` are the metrics of the rounds so far."""

    def __init__(self, case: Case, topology: Topology):
        source = case.source()
        self.state = TrainState(
            Run(
                topology=topology,
                model=case.model,
                task=case.task,
                data=DataSplits(source, source, None),
                clients=Clients((np.arange(len(source)),), (np.arange(0),), (np.arange(0),)),
                algorithm=Sync(),
                optimizer=case.optimizer,
                rounds=FOREVER,
                training=TrainingOptions(batch_size=case.batch_size, compile_backend=case.compile),
                transforms=Compose(channels_last=case.channels_last),
                round=RoundOptions(steps=case.steps),
                autocast=case.autocast,
                eval=EvalOptions(every_rounds=FOREVER),
                metrics=MetricsOptions(measure_flops=True),
            )
        )
        self.figures: list[Metrics] = []

    def __call__(self, window: int) -> None:
        metrics = train_round(self.state, self.state.run.sample_round(window))
        assert metrics is not None
        synchronized_time(self.state.run.topology.device)
        self.figures.append(metrics)


def by_hand(case: Case, topology: Topology) -> Callable[[int], None]:
    """Train the same number of steps on the same examples, which are on the device."""
    source, device = case.source(), topology.device
    inputs, targets = (part.to(device) for part in source.fetch(torch.arange(len(source))))
    if case.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    model = case.model().to(device)
    optimizer, forward = case.optimizer(model.parameters()), compile_module(model, case.compile)
    precision = torch.autocast(device.type, case.autocast) if case.autocast else nullcontext()

    def theirs(window: int) -> None:
        model.train()
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(window))
        order = order.repeat(1 + case.steps * case.batch_size // len(source)).to(device)
        for ids in order[: case.steps * case.batch_size].split(case.batch_size):
            with precision:
                loss = case.loss(forward(inputs.index_select(0, ids)), targets.index_select(0, ids))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronized_time(device)

    return theirs
