"""States of optimizers: saved, loaded into another optimizer, and swapped, without changing learning rates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from trainer.config.build import build
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.distributed.topology import distributed
from trainer.optim import Muon
from trainer.optim.optimizers import has_fused_step, optimizer_state, parameters_of, restore_optimizer_state

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
    "muon": partial(Muon, lr=0.1),
}


def two_parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))]


def step(optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
    """Step on a quadratic whose gradient is `scale` times the parameters."""
    for parameter in parameters_of(optimizer):
        parameter.grad = scale * parameter.detach()
    optimizer.step()


def copied(state):
    return {
        position: {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
        for position, entry in state.items()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_moved_to_another_optimizer_continues(name: str):
    """After two steps the state and the parameters move to a new optimizer: the third step is bit-equal."""
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
    """Also Adagrad, whose initial state is made in its constructor."""
    used, fresh = OPTIMIZERS[name](two_parameters()), OPTIMIZERS[name](two_parameters())
    step(used, 3.0)
    restore_optimizer_state(used, {})
    for ours, theirs in zip(parameters_of(used), parameters_of(fresh), strict=True):
        ours.data.copy_(theirs)
    step(used)
    step(fresh)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(used), parameters_of(fresh), strict=True))


def test_clients_swap_states_by_reference():
    """One optimizer, two clients: each gets its momentum again, and no tensor is copied."""
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


def test_learning_rates_are_unchanged():
    """Unlike with `load_state_dict`, the state does not contain the learning rate."""
    old, new = OPTIMIZERS["momentum"](two_parameters()), torch.optim.SGD(two_parameters(), lr=0.001, momentum=0.5)
    step(old)
    restore_optimizer_state(new, optimizer_state(old))
    assert new.param_groups[0]["lr"] == 0.001
    assert new.param_groups[0]["momentum"] == 0.5


def test_positions_run_through_the_groups():
    """Two groups of one parameter each are positions 0 and 1, as text, since keys in files are text."""
    first, second = two_parameters()
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.01}], lr=0.1, momentum=0.9)
    step(optimizer)
    assert parameters_of(optimizer)[1] is second
    state = optimizer_state(optimizer)
    assert list(state) == ["0", "1"]
    assert state["1"]["momentum_buffer"].shape == (1, 1)


def test_before_the_first_step_the_state_is_empty():
    assert optimizer_state(OPTIMIZERS["momentum"](two_parameters())) == {}


def test_a_fused_step_is_the_same_step():
    """Up to rounding, after ten steps."""
    ours, theirs = OPTIMIZERS["fused_adamw"](two_parameters()), OPTIMIZERS["adamw"](two_parameters())
    for _ in range(10):
        step(ours)
        step(theirs)
    for one, other in zip(parameters_of(ours), parameters_of(theirs), strict=True):
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


def test_fused_sgd_is_faster_only_on_gpus():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [has_fused_step(torch.optim.SGD, device) for device in (cpu, gpu)] == [False, True]
    assert has_fused_step(torch.optim.AdamW, gpu) and not has_fused_step(torch.optim.Adagrad, gpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_fused_optimizer_on_a_gpu_continues_from_a_state_on_the_cpu():
    """Step counters move to the GPU too, where the kernel reads them."""
    ours, theirs = ([parameter.detach().cuda().requires_grad_() for parameter in two_parameters()] for _ in range(2))
    old = OPTIMIZERS["fused_adamw"](theirs)
    step(old)
    saved = {i: {name: value.cpu() for name, value in entry.items()} for i, entry in optimizer_state(old).items()}
    new = OPTIMIZERS["fused_adamw"](ours)
    for one, other in zip(ours, theirs, strict=True):
        one.data.copy_(other)
    restore_optimizer_state(new, saved)
    step(old)
    step(new)
    assert all(map(torch.equal, ours, theirs))
