"""Small runs: real models on small random data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.algorithms import Algorithm, FedAvg, Sync
from trainer.data import Clients, DataSplits, SequenceWindows, TensorSource
from trainer.distributed.topology import Topology
from trainer.loop.options import CheckpointOptions, EvalOptions, MetricsOptions, TrainingOptions
from trainer.loop.run import Run
from trainer.models import CNN, GPT, MLP
from trainer.tasks import Classification, LanguageModelling, Task

GROUPS: dict[str, Any] = {
    "training": TrainingOptions,
    "eval": EvalOptions,
    "checkpoint": CheckpointOptions,
    "metrics": MetricsOptions,
}
TRAINING = [option.name for option in fields(TrainingOptions)]

SGD = partial(torch.optim.SGD, lr=0.1)
average = partial(torch.optim.SGD, lr=1.0)


def fedavg(**slots: Any) -> FedAvg:
    """Return FedAvg whose server applies the mean update."""
    return FedAvg(**{"server": average, **slots})


def make_model(name: str) -> nn.Module:
    """Return a small model, the same in every call."""
    torch.manual_seed(0)
    if name == "mlp":
        return MLP(inputs=784, hidden=32)
    return CNN() if name == "cnn" else GPT(vocabulary=64, length=16, layers=2, heads=2, width=32)


def make_data(name: str, examples: int) -> DataSplits:
    """Return random examples for the model of this name, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    if name == "gpt":
        tokens = torch.randint(0, 64, (examples, 17), generator=generator, dtype=torch.uint8)
        return DataSplits(SequenceWindows(tokens, 16), SequenceWindows(tokens[:8], 16), 64)
    inputs = torch.randn(examples, 1, 28, 28, generator=generator)
    targets = torch.randint(0, 10, (examples,), generator=generator)
    return DataSplits(TensorSource(inputs, targets), TensorSource(inputs[:8], targets[:8]), 10)


def make_task(name: str) -> Task:
    """Return the task of the model of this name."""
    return LanguageModelling() if name == "gpt" else Classification()


def make_clients(sizes: list[int], test: int = 8) -> Clients:
    """Return clients with these numbers of consecutive training examples; test examples are assigned in turn."""
    edges = np.cumsum([0, *sizes])
    train = tuple(np.arange(start, stop) for start, stop in pairwise(edges))
    validation = tuple(np.arange(0) for _ in sizes)
    return Clients(train, validation, tuple(np.arange(client, test, len(sizes)) for client in range(len(sizes))))


def make_run(
    topology: Topology, sizes: list[int], model: str = "mlp", algorithm: Algorithm | None = None, **choices: Any
) -> Run:
    """Return a run over clients of these sizes; by default one round of one epoch."""
    defaults: dict[str, Any] = {
        "module": make_model(model),
        "task": make_task(model),
        "data": make_data(model, sum(sizes)),
        "clients": make_clients(sizes),
        "algorithm": algorithm or Sync(),
        "optimizer": SGD,
        "rounds": 1,
        "batch_size": 8,
    }
    return run_of(topology, defaults | choices)


@dataclass(frozen=True)
class CopiesOf:
    """Makes a model that is a copy of this one."""

    module: nn.Module

    def __call__(self) -> nn.Module:
        return copy.deepcopy(self.module)


def run_of(topology: Topology, choices: Mapping[str, Any]) -> Run:
    """Return the run of these choices, named as the configuration names them: `batch_size`, `eval.every_rounds`.

    `module` is a model to be copied; other names are fields of a Run.
    """
    groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    fields_of_run: dict[str, Any] = {}
    for name, value in choices.items():
        group, _, option = name.rpartition(".")
        if name in TRAINING:
            group, option = "training", name
        if group:
            groups[group][option] = value
        elif name == "module":
            fields_of_run["model"] = CopiesOf(value)
        else:
            fields_of_run[name] = value
    options = {name: GROUPS[name](**values) for name, values in groups.items() if values}
    return Run(topology, **options, **fields_of_run)


def parameters(module: nn.Module) -> list[Tensor]:
    """Return copies of the parameters, in order."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def loss_function(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean loss for the model of this name, as written by hand."""
    if name == "gpt":
        return lambda outputs, targets: nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    return nn.functional.cross_entropy
