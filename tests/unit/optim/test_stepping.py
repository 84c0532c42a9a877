"""The step without torch's wrapper: the same bits, and hooks and profilers still run."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from tests.unit.optim.test_state import OPTIMIZERS, two_parameters
from trainer.optim import step
from trainer.optim.optimizers import parameters_of


class Halving(torch.optim.SGD):
    """A custom optimizer that halves the gradients."""

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for parameter in parameters_of(self):
            assert parameter.grad is not None
            parameter.grad *= 0.5
        super().step()


def with_gradients(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for parameter in parameters_of(optimizer):
        parameter.grad = parameter.detach().clone()
    return optimizer


@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), lambda parameters: Halving(parameters, lr=0.1)])
def test_the_bits_are_those_of_the_wrapped_step(make: Any):
    ours, theirs = make(two_parameters()), make(two_parameters())
    for _ in range(3):
        step(with_gradients(ours))
        with_gradients(theirs).step()
        assert all(map(torch.equal, parameters_of(ours), parameters_of(theirs)))


def sgd() -> torch.optim.Optimizer:
    return with_gradients(torch.optim.SGD(two_parameters(), lr=0.1))


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_are_called(when: str):
    optimizer, called = sgd(), list[str]()
    local = getattr(optimizer, f"register_step_{when}_hook")(lambda *_: called.append("local"))
    step(optimizer)
    local.remove()
    register = {"pre": register_optimizer_step_pre_hook, "post": register_optimizer_step_post_hook}[when]
    general = register(lambda *_: called.append("general"))
    step(optimizer)
    general.remove()
    step(optimizer)
    assert called == ["local", "general"]


def test_a_profiler_records_the_step():
    optimizer = sgd()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        step(optimizer)
    assert any(event.key == "Optimizer.step#SGD.step" for event in trace.key_averages())


def test_a_replaced_step_is_called():
    optimizer, called = sgd(), list[bool]()
    optimizer.step = MethodType(lambda self: called.append(True), optimizer)  # pyright: ignore[reportAttributeAccessIssue]
    step(optimizer)
    assert called
