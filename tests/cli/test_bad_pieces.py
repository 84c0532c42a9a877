"""Invalid tasks, optimizers, schedules and weights are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.refusals import assert_says, building, composing
from trainer.distributed.topology import Topology, distributed
from trainer.models import DigitsCNN

NUMBERS = ["data=custom", "data._target_=tests.support.made_up.numbers"]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with distributed(device="cpu") as topology:
        yield topology


REFUSED = {
    "a pattern of no name": [
        ["optimizer.lr_multipliers=[[embed,2],[conv1,3]]"],
        ["optimizer.lr_multipliers", "model=DigitsCNN matches embed.", "conv1.weight"],
    ],
    "no decay of none": [
        ["optimizer=custom", "optimizer._target_=torch.optim.Rprop", "optimizer.exclude_norm_bias_decay=true"],
        ["optimizer.exclude_norm_bias_decay=true", "no weight decay"],
    ],
    "rates under scaffold": [
        ["algorithm=scaffold", "silos=2", "optimizer.lr_multipliers=[[conv1,3]]"],
        ["optimizer.lr_multipliers with algorithm=scaffold", "set optimizer.lr_multipliers=[], or algorithm=fedavg"],
    ],
    "values clipped under fednova": [
        ["algorithm=fednova", "silos=2", "clip.max_value=1"],
        ["clip.max_value=1 with algorithm=fednova", "set clip.max_value=null"],
    ],
    "an order of no norm": [["clip.norm_type=1"], ["clip.norm_type=1 with clip.max_norm=null", "set clip.max_norm=1"]],
    "muon between silos": [
        ["algorithm=fedavg", "silos=2", "server._target_=trainer.optim.muon.Muon"],
        ["server=trainer.optim.muon.Muon", "needs matrices", "set server=average"],
    ],
    "torch's muon on biases": [["optimizer=custom", "optimizer._target_=torch.optim.Muon"], ["Muon", "2D"]],
    "freezing all": [["model.freeze=."], ["model.freeze=.", "nothing is left to train"]],
    "freezing none, from nowhere": [
        ["model.freeze=embed", "model.init=none.pt"],
        ["model.freeze=embed matches no parameter", "conv1.weight", "model.init=none.pt is not a file"],
    ],
    "pruning random weights": [["model.prune=0.9"], ["model.prune=0.9 without model.init", "set model.init to"]],
    "pruning below an adapter": [
        ["model.prune=2:4", "model.init=none.pt", "adapter=lora"],
        ["model.prune=2:4 with adapter=trainer.models.lora", "set adapter=none", "model.init=none.pt is not a file"],
    ],
    "an adapter of no layer": [
        ["adapter=lora", "adapter.targets=q_proj"],
        ["adapter.targets=q_proj matches no layer of model=DigitsCNN", "its layers: conv1, conv2, "],
    ],
    "a model from nowhere": [["model=transformers", "model.path=nowhere"], ["model.path=nowhere is no folder"]],
    "a task without verbs": [
        ["task=custom", "task._target_=torch.nn.Identity"],
        [
            "task=torch.nn.Identity gave a Identity without scores, headline, unit_name, has_confusion",
            "trainer.tasks.Task",
        ],
    ],
    "a model that is none": [
        ["model=custom", "model._target_=builtins.dict"],
        ["model=builtins.dict gave a dict", "torch.nn.Module"],
    ],
    "numbers as classes": [[*NUMBERS, "model=logistic", "model.inputs=6"], ["classification expects outputs"]],
    "more outputs than numbers": [
        [*NUMBERS, "task=regression", "model=logistic", "model.inputs=6"],
        ["task=Regression", "[2, 10] for targets of shape [2, 2]"],
    ],
    "classes as labels": [["task=multi_label"], ["task=MultiLabel", "[batch, labels]"]],
    "a decay of more than the run": [
        ["schedule=warmup_stable_decay", "schedule.warmup_fraction=0.9"],
        ["schedule.warmup_fraction=0.9", "no more than 1 together"],
    ],
    "a depth that is none": [["model=resnet", "model.depth=18"], ["model.depth=18", "6 n + 2"]],
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.quick_rows(7)
def test_invalid_components_are_refused(name: str, topology: Topology) -> None:
    overrides, parts = REFUSED[name]
    assert_says(building(overrides, topology), parts)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr_multipliers=[head]", "optimizer.lr_multipliers=[head]\n  valid: a list of names"),
        ("optimizer.lr_multipliers=[['(',2]]", "optimizer.lr_multipliers=[[(,2]]\n  valid: a list of names"),
        ("optimizer.exclude_norm_bias_decay=1", "optimizer.exclude_norm_bias_decay=1\n  valid: true or false"),
        ("model.freeze='('", "model.freeze=(\n  valid: a regular expression, or null"),
        ("model.init=3", "model.init=3\n  valid: a text"),
        ("model.prune=0", 'model.prune=0\n  valid: a number above 0 to below 1, "2:4"'),
        ("model.prune=1", "model.prune=1\n  valid: a number above 0 to below 1"),
        ("model.prune=-1", "model.prune=-1\n  valid: a number above 0 to below 1"),
        ("model.prune=3:4", "model.prune=3:4\n  valid: a number above 0 to below 1"),
        ("model.prune=half", "model.prune=half\n  valid: a number above 0 to below 1"),
        ("clip.norm_type=3", "clip.norm_type=3\n  valid: 1 or 2 or inf"),
        ("clip.max_value=0", "clip.max_value=0\n  valid: a number above 0, or null"),
    ],
)
def test_invalid_values_are_refused(override: str, message: str) -> None:
    assert message in composing([override])


def test_weights_of_another_model_are_refused(topology: Topology, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(DigitsCNN(classes=7, norm="batch").state_dict(), path)
    message = building([f"model.init={path}"], topology)
    assert_says(
        message, ["head.4.weight [7, 64] instead of [10, 64]", "unexpected: norm1.weight", f"model.init={path}"]
    )
