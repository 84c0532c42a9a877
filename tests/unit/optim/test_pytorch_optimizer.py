"""Optimizers of the package pytorch-optimizer: saved, restored, and evaluated at the weights that they have learnt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from tests.unit.optim.test_state import through_a_file
from trainer.optim.optimizers import enter_training, has_modes, leave_training
from trainer.optim.state import OptimizerState
from trainer.optim.validation import is_elementwise, validate_optimizer

package = pytest.importorskip("pytorch_optimizer")

KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "soap": partial(package.SOAP, lr=0.05, precondition_frequency=2),
    "shampoo": partial(package.Shampoo, lr=0.05, momentum=0.9),
    "prodigy": package.Prodigy,
    "schedulefree": partial(package.ScheduleFreeAdamW, lr=0.05, warmup_steps=3),
    "schedulefree_sgd": partial(package.ScheduleFreeSGD, lr=0.05),
    "lion": partial(package.Lion, lr=0.05),
    "adabelief": partial(package.AdaBelief, lr=0.05),
}
SHAPES = [(3, 2), (4,), (2, 3, 2)]


def some_parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 2, torch.Size(shape).numel()).view(shape)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: range) -> None:
    """Step on a quadratic with noise that depends on the step."""
    enter_training(optimizer)
    for step in steps:
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = parameter.detach() + 0.1 * noise
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("between", [False, True], ids=["inside a round", "between rounds"])
def test_it_continues_with_the_same_bits(kind: str, between: bool):
    """In mid-round with the weights of training, between rounds with those of evaluation; through a file."""
    parameters = some_parameters()
    old = OptimizerState(KINDS[kind](parameters))
    train(old.optimizer, parameters, range(5))
    if between:
        leave_training(old.optimizer)
    others = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    new = OptimizerState(KINDS[kind](others))
    new.load_state_dict(through_a_file(old.state_dict()))
    for state, its in ((old, parameters), (new, others)):
        train(state.optimizer, its, range(5, 9))
        leave_training(state.optimizer)
    assert all(map(torch.equal, parameters, others))


@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_the_trial_of_a_run(kind: str):
    validate_optimizer(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_whether_rows_move_by_themselves(kind: str):
    """Not if it looks at matrices, or measures all gradients together."""
    assert is_elementwise(KINDS[kind]) == (kind not in ("soap", "shampoo", "prodigy"))


def test_what_is_learnt_is_the_mean_of_the_sequence():
    """Defazio et al. 2024: x is the mean of the z, which step by gradients at y = (1 - beta) z + beta x."""
    parameter, beta, lr = torch.nn.Parameter(torch.tensor([1.0, -2.0])), 0.9, 0.1
    optimizer = package.ScheduleFreeSGD([parameter], lr=lr, momentum=beta)
    z = x = parameter.detach().clone()
    enter_training(optimizer)
    for step in range(1, 8):
        y = (1 - beta) * z + beta * x
        torch.testing.assert_close(parameter.detach(), y)
        parameter.grad = 3 * parameter.detach()
        optimizer.step()
        z = z - lr * 3 * y
        x = x + (z - x) / step
    leave_training(optimizer)
    torch.testing.assert_close(parameter.detach(), x)
    leave_training(optimizer)
    torch.testing.assert_close(parameter.detach(), x)


def test_optimizers_of_torch_have_one_model():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert not has_modes(optimizer)
    enter_training(optimizer)
    leave_training(optimizer)
