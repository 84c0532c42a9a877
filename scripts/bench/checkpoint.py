"""Measure the cost of checkpoints to training.

    python -m scripts.bench.checkpoint

Two synchronous workers of one thread each alternate between windows of training that begin with a round checkpoint and
windows without one. A thread writes the checkpoint while training continues. Its cost is the additional time of the
window; the stall is the time in which training stands still.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from scripts.bench.paired_timing import in_workers, machine
from scripts.bench.step import images
from trainer.algorithms import Sync
from trainer.checkpoint import Checkpointer
from trainer.checkpoint.checkpointer import assign_leaves
from trainer.checkpoint.format import iter_leaves
from trainer.data import Clients, DataSplits, TensorSource
from trainer.distributed.topology import Topology, distributed
from trainer.loop.checkpointing import make_checkpointer, save_round_checkpoint
from trainer.loop.options import EvalOptions, RoundOptions, TrainingOptions
from trainer.loop.round import train_round
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models import DigitsCNN
from trainer.tasks import Classification


@dataclass(frozen=True)
class Case:
    """A model, its optimizer, the steps of a window, and the seconds between two saves."""

    model: Callable[[], nn.Module]
    source: Callable[[], TensorSource]
    optimizer: Callable[..., torch.optim.Optimizer]
    batch_size: int
    steps: int
    seconds_between: float | None


def wide() -> nn.Module:
    """Return a model of 100 million parameters in two layers."""
    first, second, last = nn.Linear(784, 10_000), nn.Linear(10_000, 9_220), nn.Linear(9_220, 10)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)


CASES = {
    "100M": Case(wide, partial(images, 28), partial(torch.optim.AdamW, lr=1e-4), 16, 12, 60.0),
    "small": Case(DigitsCNN, partial(images, 8), partial(torch.optim.AdamW, lr=1e-3), 128, 250, None),
}


def measure(name: str, case: Case, topology: Topology, folder: Path, pairs: int) -> None:
    """Print the stall beside the time of a bare copy, and the share of the training time that saves take."""
    source = case.source()
    run = Run(
        topology=topology,
        model=case.model,
        task=Classification(),
        data=DataSplits(source, source, 10),
        clients=Clients((np.arange(len(source)),), (np.arange(0),), (np.arange(0),)),
        algorithm=Sync(),
        optimizer=case.optimizer,
        rounds=10**6,
        training=TrainingOptions(batch_size=case.batch_size),
        round=RoundOptions(steps=case.steps),
        eval=EvalOptions(every_rounds=10**6),
    )
    state = TrainState(run)
    checkpoints = make_checkpointer(run, folder)
    plain, saving, stalls, copies = [], [], [], []
    for pair in range(pairs + 1):
        order = (False, True) if pair % 2 else (True, False)
        for saves in order:
            seconds = window(state, checkpoints if saves else None)
            if pair:
                (saving if saves else plain).append(seconds)
        if pair:
            stalls.append(checkpoints.take_stall_seconds())
            copies.append(copy_seconds(state))
        checkpoints.take_stall_seconds()
    if topology.rank == 0:
        lost = median(b - a for a, b in zip(plain, saving, strict=True))
        between = case.seconds_between or median(plain)
        ratios = sorted(stall / copy for stall, copy in zip(stalls, copies, strict=True))
        print(
            f"{name}: {bytes_of(state) / 1e6:,.1f} MB a rank, {pairs} pairs\n"
            f"  stall {median(stalls):.4f} s, copy {median(copies):.4f} s, "
            f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})\n"
            f"  a window of {median(plain):.2f} s takes {lost:+.3f} s longer, {lost / between:.2%} of {between:.1f} s",
            flush=True,
        )


def window(state: TrainState, checkpointer: Checkpointer | None) -> float:
    """Return the seconds of a round of training, which may begin with a save."""
    dist.barrier()
    began = perf_counter()
    if checkpointer:
        state.progress.rounds += 1
        save_round_checkpoint(state, checkpointer)
    train_round(state, state.run.sample_round(0))
    dist.barrier()
    seconds = perf_counter() - began
    if checkpointer:
        checkpointer.wait()
    return seconds


def share(state: TrainState) -> list[torch.Tensor]:
    """Return the tensors that this rank saves."""
    topology = state.run.topology
    common = {"model": state.model.shared_state(), "clients": state.trainer.clients.state_dict()}
    mine = assign_leaves(common, topology.replica, topology.num_replicas)
    return [leaf for _, leaf in iter_leaves(mine) if isinstance(leaf, torch.Tensor)]


def bytes_of(state: TrainState) -> int:
    return sum(tensor.nbytes for tensor in share(state))


def copy_seconds(state: TrainState) -> float:
    """Return the seconds of a bare copy of these tensors."""
    tensors = share(state)
    began = perf_counter()
    copied = [tensor.clone() for tensor in tensors]
    seconds = perf_counter() - began
    assert len(copied) == len(tensors)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=5)
    choices = parser.parse_args()
    if not in_workers("scripts.bench.checkpoint"):
        return
    with distributed(device="cpu") as topology, tempfile.TemporaryDirectory() as folder:
        if topology.rank == 0:
            print(machine())
        for name in choices.cases:
            measure(name, CASES[name], topology, Path(folder) / name, choices.pairs)


if __name__ == "__main__":
    main()
