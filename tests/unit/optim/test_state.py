"""States of optimizers: saved, loaded into another optimizer, swapped, and reset, wherever an optimizer keeps them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.checkpoint.format import iter_leaves, unflatten
from trainer.optim import Muon
from trainer.optim.optimizers import parameters_of
from trainer.optim.state import OptimizerState, clone


class Countdown(torch.optim.Optimizer):
    """Steps by lr / k, where k counts the steps in the parameter group."""

    def __init__(self, params: Any, lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"] / self._divisor(group))

    def _divisor(self, group: dict[str, Any]) -> float:
        return group["k"]


class OwnRate(Countdown):
    """Changes its learning rate itself, and keeps a tensor and a tuple in a group that it began without."""

    def _divisor(self, group: dict[str, Any]) -> float:
        group["lr"] *= 0.5
        first, _ = group.setdefault("seen", (torch.zeros(2), "seen"))
        first += 1
        return float(first[0])


class Attribute(Countdown):
    """Counts in an attribute, which its own `state_dict` has."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        self.count = {1: 0, "1": 0}

    def _divisor(self, group: dict[str, Any]) -> float:
        self.count[1] += 1
        return self.count[1]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"count": dict(self.count)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.count = dict(state_dict["count"])


class Common(Countdown):
    """Counts in `state`, under a name that is no parameter."""

    def _divisor(self, group: dict[str, Any]) -> float:
        common = self.state["common"]
        common["count"] = common.get("count", 0) + 1
        return common["count"]


class Lists(Countdown):
    """Keeps a list of tensors, and a mapping, for each parameter; the state is in float64."""

    def _divisor(self, group: dict[str, Any]) -> float:
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state["history"] = [torch.zeros_like(parameter, dtype=torch.float64) for _ in range(2)]
                state["by_name"] = {"count": (0, None)}
            state["history"][0].add_(parameter.grad)
            state["by_name"]["count"] = (state["by_name"]["count"][0] + 1, None)
        first = self.state[group["params"][0]]
        return float(first["history"][0].abs().sum()) + first["by_name"]["count"][0]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "fused_adamw": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "fused_momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "amsgrad": partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.5),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "nadam": partial(torch.optim.NAdam, lr=0.1),
    "rprop": partial(torch.optim.Rprop, lr=0.1),
    "asgd": partial(torch.optim.ASGD, lr=0.1),
    "muon": partial(Muon, lr=0.1),
    "countdown": Countdown,
    "own_rate": OwnRate,
    "attribute": Attribute,
    "common": Common,
    "lists": Lists,
}


def two_parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))]


def step(optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
    """Step on a quadratic whose gradient is `scale` times the parameters."""
    for parameter in parameters_of(optimizer):
        parameter.grad = scale * parameter.detach()
    optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as a checkpoint gives it back: tensors are copied, all else goes through JSON."""
    leaves = dict(iter_leaves(state))
    return unflatten(
        {
            name: leaf.clone() if isinstance(leaf, Tensor) else json.loads(json.dumps(leaf))
            for name, leaf in leaves.items()
        }
    )


def assert_equal(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_moved_to_another_optimizer_continues(name: str):
    """After two steps the state and the parameters move to a new optimizer: the third step is bit-equal."""
    old = OptimizerState(OPTIMIZERS[name](two_parameters()))
    step(old.optimizer)
    step(old.optimizer, 0.5)
    new = OptimizerState(OPTIMIZERS[name](two_parameters()))
    for ours, theirs in zip(new.parameters, old.parameters, strict=True):
        ours.data.copy_(theirs)
    new.load_state_dict(through_a_file(old.state_dict()))
    for scale in (2.0, 0.5):
        step(old.optimizer, scale)
        step(new.optimizer, scale)
        assert_equal(new.optimizer, old.optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_empty_state_is_a_fresh_optimizer(name: str):
    """Also Adagrad, whose initial state is made in its constructor."""
    used, fresh = OptimizerState(OPTIMIZERS[name](two_parameters())), OPTIMIZERS[name](two_parameters())
    for scale in (3.0, 1.0):
        step(used.optimizer, scale)
        used.load_state_dict({})
    for ours, theirs in zip(used.parameters, parameters_of(fresh), strict=True):
        ours.data.copy_(theirs)
    for scale in (1.0, 2.0):
        step(used.optimizer, scale)
        step(fresh, scale)
        assert_equal(used.optimizer, fresh)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_has_one_owner(name: str):
    """Two optimizers load the same state: the steps of one do not move the other, nor the state that was given."""
    old = OptimizerState(OPTIMIZERS[name](two_parameters()))
    step(old.optimizer)
    given = clone(old.state_dict())
    first, second = (OptimizerState(OPTIMIZERS[name](two_parameters())) for _ in range(2))
    first.load_state_dict(clone(given))
    second.load_state_dict(clone(given))
    step(first.optimizer, 5.0)
    assert dict(iter_leaves(second.state_dict())).keys() == dict(iter_leaves(given)).keys()
    for path, leaf in iter_leaves(second.state_dict()):
        expected = dict(iter_leaves(given))[path]
        assert torch.equal(leaf, expected) if isinstance(leaf, Tensor) else leaf == expected


def test_clients_swap_states_by_reference():
    """One optimizer, two clients: each gets its momentum again, and no tensor is copied."""
    state = OptimizerState(OPTIMIZERS["momentum"](two_parameters()))
    states: dict[int, Any] = {}
    for client, scale in ((0, 1.0), (1, 5.0), (0, 1.0)):
        state.load_state_dict(states.get(client, {}))
        step(state.optimizer, scale)
        states[client] = state.state_dict()
    first, second = (states[client]["0"]["momentum_buffer"] for client in (0, 1))
    assert first.data_ptr() != second.data_ptr()
    state.load_state_dict(states[1])
    assert state.optimizer.state[state.parameters[0]]["momentum_buffer"] is second


def test_options_are_unchanged():
    """Unlike with torch's `load_state_dict`, a state does not contain the options, such as the learning rate."""
    old = OptimizerState(OPTIMIZERS["momentum"](two_parameters()))
    new = OptimizerState(torch.optim.SGD(two_parameters(), lr=0.001, momentum=0.5))
    step(old.optimizer)
    new.load_state_dict(old.state_dict())
    assert new.optimizer.param_groups[0]["lr"] == 0.001
    assert new.optimizer.param_groups[0]["momentum"] == 0.5


def test_a_state_keeps_its_precision():
    """Unlike with torch's `load_state_dict`, a float64 state of float32 parameters stays so."""
    old, new = (OptimizerState(Lists(two_parameters())) for _ in range(2))
    step(old.optimizer)
    new.load_state_dict(through_a_file(old.state_dict()))
    assert new.optimizer.state[new.parameters[0]]["history"][1].dtype == torch.float64


def test_positions_run_through_the_groups():
    """Two groups of one parameter each are positions 0 and 1, as text, since keys in files are text."""
    first, second = two_parameters()
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.01}], lr=0.1, momentum=0.9)
    state = OptimizerState(optimizer)
    step(optimizer)
    assert state.parameters[1] is second
    assert list(state.state_dict()) == ["0", "1"]
    assert state.state_dict()["1"]["momentum_buffer"].shape == (1, 1)


def test_before_the_first_step_the_state_is_empty():
    assert OptimizerState(OPTIMIZERS["momentum"](two_parameters())).state_dict() == {}


def test_what_cannot_be_saved_is_refused():
    """Objects that an optimizer was given stay what they are; one that it makes later could not be restored."""
    optimizer = Countdown([{"params": two_parameters(), "window": deque([1])}])
    state = OptimizerState(optimizer)
    step(optimizer)
    assert state.state_dict() == {"groups": {"0": {"k": 1}}}
    optimizer.param_groups[0]["history"] = deque([1])
    with pytest.raises(ValueError, match=r"Countdown keeps a deque as history.*\n  valid: "):
        state.state_dict()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_fused_optimizer_on_a_gpu_continues_from_a_state_on_the_cpu():
    """Step counters move to the GPU too, where the kernel reads them."""
    ours, theirs = ([parameter.detach().cuda().requires_grad_() for parameter in two_parameters()] for _ in range(2))
    old = OptimizerState(OPTIMIZERS["fused_adamw"](theirs))
    step(old.optimizer)
    saved = {i: {name: value.cpu() for name, value in entry.items()} for i, entry in old.state_dict().items()}
    new = OptimizerState(OPTIMIZERS["fused_adamw"](ours))
    for one, other in zip(ours, theirs, strict=True):
        one.data.copy_(other)
    new.load_state_dict(saved)
    step(old.optimizer)
    step(new.optimizer)
    assert all(map(torch.equal, ours, theirs))
