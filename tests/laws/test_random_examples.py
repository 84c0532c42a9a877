"""Data sets that draw random numbers: the same examples on any number of ranks and after any restart."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.laws.cases import SIZES, Records, assert_close, assert_same, case_run, figures, leaves, tiny_data, train
from tests.laws.test_midround import assert_left_and_bit_equal
from trainer.data import DataSplits
from trainer.data.loading.readers import LoadingOptions
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Examples with noise of the default generators of torch, numpy and random."""

    def __init__(self, inputs: Tensor, targets: Tensor):
        self.inputs, self.labels = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(self.inputs.shape[1]) + np.random.standard_normal() + random.random()
        return self.inputs[index] + 0.1 * noise, self.labels[index]


def choices() -> dict[str, Any]:
    data = tiny_data(sum(SIZES))
    parts = (Augmented(part.inputs, part.targets) for part in (data.train, data.test))  # type: ignore[attr-defined]
    return {"data": DataSplits(*parts, 3), "round": RoundOptions(steps=5)}


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_any_number_of_ranks_trains_on_the_same_draws(ranks, name: str) -> None:
    alone, other = (ranks(size).run(train, name, 1, choices())[0] for size in (1, 2))
    assert_close(other.model, alone.model, 1e-10)
    for ours, theirs in zip(other.rounds, alone.rounds, strict=True):
        assert_close(figures(ours), figures(theirs), 1e-9)


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_a_resumed_run_draws_what_it_would_have_drawn(ranks, name: str, tmp_path: Path) -> None:
    assert_left_and_bit_equal(ranks(2), name, 2, choices(), tmp_path, {0: (0, 2)})


def allow_workers() -> None:
    """Let this rank of the tests have processes of its own."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def fit_with_workers(name: str, workers: int) -> tuple[dict[str, Any], list[Any]]:
    """Train with this number of workers a rank."""
    allow_workers()
    with distributed(1 if name == "sync" else 2) as topology:
        loading = {"loading": LoadingOptions(workers=workers)}
        records = Records()
        model = fit(case_run(topology, name, choices() | loading), [records]).model
        return leaves(model.state_dict()), [figures(metrics) for metrics in records.rounds]


@pytest.mark.parametrize("name", ["sync", "fedavg"])
@pytest.mark.quick_rows(1)
def test_any_number_of_workers_reads_the_same_draws(ranks, name: str) -> None:
    """Bit for bit, in training over several clients and rounds and in evaluation."""
    for ours, theirs in zip(
        ranks(2).run(fit_with_workers, name, 2), ranks(2).run(fit_with_workers, name, 0), strict=True
    ):
        assert_same(ours[0], theirs[0])
        for mine, yours in zip(ours[1], theirs[1], strict=True):
            assert_same(mine, yours)


@pytest.mark.long
@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_workers_resume_in_the_middle_of_a_round(ranks, name: str, tmp_path: Path) -> None:
    ranks(2).run(allow_workers)
    loading = {"loading": LoadingOptions(workers=2)}
    assert_left_and_bit_equal(ranks(2), name, 2, choices() | loading, tmp_path, {0: (0, 2)})
