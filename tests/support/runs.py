"""Small runs: real models on small random data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.algorithms import Algorithm, FedAvg, Sync
from trainer.data import Clients, DataSplits, SequenceWindows, TensorSource
from trainer.distributed.topology import Topology
from trainer.loop.run import Run
from trainer.models import CNN, GPT, MLP
from trainer.tasks import Classification, LanguageModelling, Task

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
    train = tuple(np.arange(start, stop) for start, stop in zip(edges, edges[1:], strict=False))
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
    return Run(topology, **(defaults | choices))


def parameters(module: nn.Module) -> list[Tensor]:
    """Return copies of the parameters, in order."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def loss_function(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean loss for the model of this name, as written by hand."""
    if name == "gpt":
        return lambda outputs, targets: nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    return nn.functional.cross_entropy
