"""Measure the speed of a synchronous step, compared with a hand-written DistributedDataParallel loop.

    python -m scripts.bench.step

Two workers of one thread each run both sides in turn. Ours is a round with its normal logging (console, metrics.jsonl,
TensorBoard), without evaluation and checkpoints, which the hand-written loop does not have. --gradients chooses another
gradient compression for ours; the hand-written loop has none.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from scripts.bench import ddp_baseline
from scripts.bench.paired_timing import Side, duel, in_workers, machine
from trainer.algorithms import Sync
from trainer.data import Clients, DataSplits, SequenceWindows, Source, TensorSource
from trainer.distributed.gradients import (
    FullPrecisionReducer,
    HalfPrecisionReducer,
    Int8Reducer,
    PowerSGDReducer,
)
from trainer.distributed.topology import Topology, distributed
from trainer.loggers import ConsoleLogger, JsonLinesLogger, Logger, TensorBoardLogger
from trainer.loop.options import EvalOptions, RoundOptions, TrainingOptions
from trainer.loop.round import train_round
from trainer.loop.run import GradientReducerFactory, Run
from trainer.loop.train_state import TrainState
from trainer.models import GPT, MLP, DigitsCNN
from trainer.tasks import Classification, LanguageModelling, Task


@dataclass(frozen=True)
class Case:
    """A model, its examples, the number of them that one rank takes in a step, and the steps of one timed round."""

    model: Callable[[], nn.Module]
    source: Callable[[], Source]
    task: Task
    loss: Callable[..., torch.Tensor]
    examples_per_rank: int
    steps: int


def images(side: int) -> TensorSource:
    """Return random images of side x side in 10 classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60_000, 1, side, side, generator=generator)
    return TensorSource(inputs, torch.randint(0, 10, (60_000,), generator=generator))


def tokens(length: int) -> SequenceWindows:
    """Return random windows of bytes."""
    generator = torch.Generator().manual_seed(0)
    return SequenceWindows(torch.randint(0, 256, (2_000, length + 1), generator=generator, dtype=torch.uint8), length)


def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


CASES = {
    "mlp": Case(MLP, partial(images, 28), Classification(), F.cross_entropy, 10, 500),
    "cnn": Case(DigitsCNN, partial(images, 8), Classification(), F.cross_entropy, 64, 200),
    "gpt": Case(
        partial(GPT, length=128, layers=8, heads=8, width=320),
        partial(tokens, 128),
        LanguageModelling(),
        token_loss,
        4,
        8,
    ),
}


GRADIENTS: dict[str, GradientReducerFactory] = {
    "fp32": FullPrecisionReducer,
    "bf16": HalfPrecisionReducer,
    "fp16": partial(HalfPrecisionReducer, "float16"),
    "int8": Int8Reducer,
    "powersgd": partial(PowerSGDReducer, start=2),
}


def compare(
    name: str, case: Case, topology: Topology, folder: Path, pairs: int, reducer: GradientReducerFactory
) -> None:
    """Print the rates of both sides in examples per second."""
    batch_size = case.examples_per_rank * topology.world_size
    source, optimizer = case.source(), partial(torch.optim.SGD, lr=0.01)
    run = Run(
        topology=topology,
        model=case.model,
        task=case.task,
        data=DataSplits(source, source, None),
        clients=Clients((np.arange(len(source)),), (np.arange(0),), (np.arange(0),)),
        algorithm=Sync(),
        optimizer=optimizer,
        rounds=10**6,
        training=TrainingOptions(batch_size=batch_size),
        round=RoundOptions(steps=case.steps),
        eval=EvalOptions(every_rounds=10**6),
        gradient_compression=reducer,
    )
    state = TrainState(run)
    with ExitStack() as stack:
        console = ConsoleLogger(run.rounds, stream=stack.enter_context(open(folder / "console", "w")))
        sinks: list[Logger] = [JsonLinesLogger(folder / "metrics.jsonl"), TensorBoardLogger(folder, {}), console]

        def ours(pair: int) -> None:
            metrics = train_round(state, run.sample_round(pair), console.step)
            assert metrics is not None
            metrics = state.progress.advance(metrics, 0.0)
            for sink in sinks if topology.rank == 0 else []:
                sink.log_round(metrics)

        theirs = by_hand(case, source, optimizer, batch_size)
        duel(name, ours, theirs, pairs, "examples/s", case.steps * batch_size)


def by_hand(case: Case, source: Source, optimizer: Callable[..., torch.optim.Optimizer], batch_size: int) -> Side:
    """Train the hand-written side: the same number of steps on the same arrays."""
    inputs, targets = source.fetch(torch.arange(len(source)))
    model = case.model()
    step = optimizer(model.parameters())
    wrapped = ddp_baseline.wrap(model)

    def theirs(pair: int) -> None:
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(pair)).repeat(2)
        batches = ddp_baseline.shares(order[: case.steps * batch_size], batch_size)
        ddp_baseline.steps(wrapped, step, case.loss, inputs, targets, batches)

    return theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--gradients", choices=GRADIENTS, default="fp32")
    choices = parser.parse_args()
    if not in_workers("scripts.bench.step"):
        return
    with distributed(device="cpu") as topology, tempfile.TemporaryDirectory() as folder:
        if topology.rank == 0:
            print(machine())
        for name in choices.cases:
            compare(name, CASES[name], topology, Path(folder), choices.pairs, GRADIENTS[choices.gradients])


if __name__ == "__main__":
    main()
