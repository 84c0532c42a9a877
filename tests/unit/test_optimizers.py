"""The state of an optimizer as a value: taken out, put into another, swapped, and never mixed with its rates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from trainer.optim import Muon
from trainer.optim.optimizers import optimizer_state, parameters_of, restore_optimizer_state

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "amsgrad": partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.5),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "nadam": partial(torch.optim.NAdam, lr=0.1),
    "muon": partial(Muon, lr=0.1),
}


def two_parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))]


def step(optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
    """One step down a bowl whose slope is `scale` times the parameters."""
    for parameter in parameters_of(optimizer):
        parameter.grad = scale * parameter.detach()
    optimizer.step()


def copied(state):
    return {
        position: {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
        for position, entry in state.items()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_moved_to_another_optimizer_goes_on_there(name: str):
    """Two steps, then the state and the parameters into a new optimizer: the third step is bit-equal."""
    old = OPTIMIZERS[name](two_parameters())
    step(old)
    step(old, 0.5)
    new = OPTIMIZERS[name](two_parameters())
    for ours, theirs in zip(parameters_of(new), parameters_of(old), strict=True):
        ours.data.copy_(theirs)
    restore_optimizer_state(new, copied(optimizer_state(old)))
    step(old, 2.0)
    step(new, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(new), parameters_of(old), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_empty_state_is_a_fresh_optimizer(name: str):
    """Also Adagrad, whose state is made when it is built: a reset one must not miss it."""
    used, fresh = OPTIMIZERS[name](two_parameters()), OPTIMIZERS[name](two_parameters())
    step(used, 3.0)
    restore_optimizer_state(used, {})
    for ours, theirs in zip(parameters_of(used), parameters_of(fresh), strict=True):
        ours.data.copy_(theirs)
    step(used)
    step(fresh)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(used), parameters_of(fresh), strict=True))


def test_clients_swap_states_by_reference():
    """One optimizer, two clients: each finds the momentum that it left, and no tensor is copied."""
    optimizer = OPTIMIZERS["momentum"](two_parameters())
    states = {}
    for client, scale in ((0, 1.0), (1, 5.0), (0, 1.0)):
        restore_optimizer_state(optimizer, states.get(client, {}))
        step(optimizer, scale)
        states[client] = optimizer_state(optimizer)
    first, second = (states[client]["0"]["momentum_buffer"] for client in (0, 1))
    assert first.data_ptr() != second.data_ptr()
    restore_optimizer_state(optimizer, states[1])
    assert optimizer.state[parameters_of(optimizer)[0]]["momentum_buffer"] is second


def test_rates_stay_as_they_are():
    """Unlike with `load_state_dict`, a state of a run with another rate does not bring it along."""
    old, new = OPTIMIZERS["momentum"](two_parameters()), torch.optim.SGD(two_parameters(), lr=0.001, momentum=0.5)
    step(old)
    restore_optimizer_state(new, optimizer_state(old))
    assert new.param_groups[0]["lr"] == 0.001
    assert new.param_groups[0]["momentum"] == 0.5


def test_positions_run_through_the_groups():
    """Two groups of one parameter each are positions 0 and 1, named as text, for files know no numbers."""
    first, second = two_parameters()
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.01}], lr=0.1, momentum=0.9)
    step(optimizer)
    assert parameters_of(optimizer)[1] is second
    state = optimizer_state(optimizer)
    assert list(state) == ["0", "1"]
    assert state["1"]["momentum_buffer"].shape == (1, 1)


def test_before_the_first_step_there_is_nothing():
    assert optimizer_state(OPTIMIZERS["momentum"](two_parameters())) == {}
