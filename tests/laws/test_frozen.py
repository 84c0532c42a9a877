"""Frozen parameters are made again with the model: checkpoints do not contain them, and notice another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.laws.cases import SIZES, case_run, silos_of, tiny_data
from tests.laws.test_midround import assert_left_and_bit_equal
from tests.laws.test_resume import ROUNDS, assert_bit_equal, noisy_choices, noisy_model, round_checkpoint
from trainer.checkpoint import Checkpointer
from trainer.checkpoint.run_dir import RunDir
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.models.flat import frozen_tensors
from trainer.utils.errors import InputError


def half_frozen() -> nn.Module:
    """Return a model whose first layer, of 56 numbers, is frozen."""
    module = noisy_model()
    module[0].requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    return module


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_a_run_is_resumed_without_them(ranks, name: str, tmp_path: Path):
    assert_bit_equal(ranks(2), name, 2, noisy_choices(name) | {"module": half_frozen()}, tmp_path)
    assert not {"0.weight", "0.bias"} & round_checkpoint(tmp_path / "one", ROUNDS).load("model").keys()


def test_a_run_is_resumed_without_them_in_the_middle_of_a_round(ranks, tmp_path: Path):
    choices = noisy_choices("fedavg") | {"module": half_frozen()}
    assert_left_and_bit_equal(ranks(2), "fedavg", 2, choices, tmp_path, {0: (0, 2)})


def train_and_meddle(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Train a round; return the error of resuming it with another frozen layer, and the first model."""
    with distributed(silos_of(name, 2)) as topology:
        data = {"data": tiny_data(sum(SIZES), torch.float32), "checkpoint.every_rounds": 1}
        run = case_run(topology, name, data | {"module": half_frozen()})
        checkpoints = Checkpointer(folder / "checkpoints", topology, run.assignment_digest)
        result = fit(run, (), checkpoints, until=1)
        other = half_frozen()
        with torch.no_grad():
            other[0].bias[0] += 1  # pyright: ignore[reportIndexIssue]
        run = case_run(topology, name, data | {"module": other})
        with pytest.raises(InputError) as refusal:
            fit(run, (), checkpoints, checkpoints.latest())
        return str(refusal.value), result.model.state_dict()


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_another_frozen_model_is_refused(ranks, name: str, tmp_path: Path):
    """On every rank. The finished model on the disk has all its parameters."""
    results = ranks(2).run(train_and_meddle, name, tmp_path)
    for message, _ in results:
        assert "other frozen parameters" in message and "model.path=" in message
    from safetensors.torch import load_file

    RunDir(tmp_path).write_models(frozen_tensors(half_frozen()))
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == results[0][1].keys() and torch.equal(
        saved["0.weight"], half_frozen().state_dict()["0.weight"]
    )
