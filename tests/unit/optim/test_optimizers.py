"""Optimizers of conf/optimizer/: their defaults, and which step is the faster one."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from tests.unit.optim.test_state import step, two_parameters
from trainer.config.build import build
from trainer.config.compose import compose_tree
from trainer.config.groups import CONF
from trainer.config.instantiate import import_target
from trainer.config.schema import read_config
from trainer.distributed.topology import distributed
from trainer.optim.optimizers import has_fused_step
from trainer.optim.validation import is_elementwise


def test_a_fused_step_is_the_same_step():
    """Up to rounding, after ten steps."""
    ours, theirs = (torch.optim.AdamW(two_parameters(), lr=0.1, fused=fused) for fused in (True, False))
    for _ in range(10):
        step(ours)
        step(theirs)
    for one, other in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        (["optimizer=adamw"], True),
        (["optimizer=adam", "+optimizer.fused=false"], False),
        (["optimizer=adam", "+optimizer.foreach=true"], None),
        (["optimizer=sgd"], None),
        (["optimizer=rmsprop"], None),
    ],
)
def test_the_faster_step_is_the_default(overrides: list[str], fused: bool | None):
    with distributed(device="cpu") as topology:
        run = build(read_config(compose_tree(overrides)), topology)
    groups = run.optimizer([("a", two_parameters()[0])]).param_groups
    assert groups[0].get("fused") == fused


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adafactor", "Muon"])
def test_an_optimizer_says_whether_rows_move_by_themselves(kind: str):
    make = partial(getattr(torch.optim, kind), lr=0.01, weight_decay=0.1)
    assert is_elementwise(make) == (kind not in ("Adafactor", "Muon"))


def test_fused_sgd_is_faster_only_on_gpus():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [has_fused_step(torch.optim.SGD, device) for device in (cpu, gpu)] == [False, True]
    assert has_fused_step(torch.optim.AdamW, gpu) and not has_fused_step(torch.optim.Adagrad, gpu)


@pytest.mark.parametrize("file", sorted((CONF / "optimizer").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_defaults_are_those_of_the_optimizer(file: Path):
    """All but the learning rate, and the momentum by which a choice has its name."""
    arguments = yaml.safe_load(file.read_text())
    target = arguments.pop("_target_")
    if target == "???":
        return
    parameters = inspect.signature(import_target({"_target_": target})).parameters
    for name in arguments.keys() - {"lr", file.stem}:
        value = tuple(arguments[name]) if isinstance(arguments[name], list) else arguments[name]
        assert value == parameters[name].default, name
