"""A trial of an optimizer on small parameters, before a run is built on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import Parameter, signature

import torch
from torch import nn

from trainer.optim.optimizers import OptimizerFactory, enter_training, leave_training, step
from trainer.optim.state import OptimizerState, clone
from trainer.utils.errors import InputError

MATRIX_AND_VECTOR = ((3, 2), (3,))
VECTOR = ((3,),)
TRIAL_STEPS = 8


def validate_optimizer(make: OptimizerFactory, shapes: Sequence[tuple[int, ...]] = MATRIX_AND_VECTOR) -> None:
    """Check that an optimizer can be made, steps by gradients alone, and goes on with the same bits from saved state.

    Args:
        make: makes it.
        shapes: those of the parameters to try it on.

    Raises:
        ValueError: it does not, or making it raised this.
    """
    parameters = [nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape)) for shape in shapes]
    optimizer = make(parameters)
    closure = signature(optimizer.step).parameters.get("closure")
    if closure and closure.default is Parameter.empty:
        raise ValueError(
            "its step calls a closure, which computes the loss again; a run computes it once a step.\n"
            "  choose one that steps by gradients alone, such as SGD or Adam"
        )
    state = OptimizerState(optimizer)
    with torch.random.fork_rng(devices=[]):  # of optimizers that add noise
        try:
            enter_training(optimizer)
            _step(optimizer, parameters, 1)
            resumed_parameters = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
            resumed = OptimizerState(make(resumed_parameters))
            resumed.load_state_dict(clone(state.state_dict()))
            _step(optimizer, parameters, 2)
            _step(resumed.optimizer, resumed_parameters, 2)
            leave_training(optimizer)
            leave_training(resumed.optimizer)
        except InputError:
            raise
        except Exception as error:
            raise ValueError(f"its step failed: {type(error).__name__}: {error}") from error
    if not all(map(torch.equal, parameters, resumed_parameters)):
        raise ValueError(
            "restored from its saved state, it takes another step: some of what it knows is not in its state, which "
            "checkpoints and clients keep"
        )


def is_elementwise(make: OptimizerFactory) -> bool:
    """Return whether an optimizer moves the rows of a matrix as it would if others had the other rows.

    So do SGD and Adam, but none that looks at a whole matrix, as Muon does, or at all gradients together.

    Args:
        make: makes it.
    """
    draw = torch.Generator().manual_seed(0)
    start, *gradients = torch.rand(TRIAL_STEPS + 1, 4, 6, generator=draw, dtype=torch.float64)
    whole = nn.Parameter(start.clone())
    rows = [nn.Parameter(part.clone()) for part in start.split(2)]
    optimizers = [make([whole]), *(make([part]) for part in rows)]
    with torch.random.fork_rng(devices=[]):
        for optimizer in optimizers:
            enter_training(optimizer)
        for number, gradient in enumerate(gradients):
            torch.default_generator.manual_seed(number)
            for parameter, part in zip((whole, *rows), (gradient, *gradient.split(2)), strict=True):
                parameter.grad = part.clone()  # some change it in place
            for optimizer in optimizers:
                step(optimizer)
        for optimizer in optimizers:
            leave_training(optimizer)
    # An optimizer that estimates its own rate begins with tiny steps.
    moved, expected = torch.cat([part.detach() for part in rows]) - start, whole - start
    return torch.allclose(moved, expected, rtol=1e-6, atol=0)


def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], number: int) -> None:
    torch.default_generator.manual_seed(number)
    for parameter in parameters:
        parameter.grad = torch.arange(1.0, parameter.numel() + 1).view_as(parameter) / number
    step(optimizer)
