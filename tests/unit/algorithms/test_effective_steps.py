"""The displacement of optimizers under a constant gradient of 1, in closed form; some optimizers are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.algorithms.effective_steps import EffectiveSteps, nonlinear_optimizer
from trainer.optim import GradientClipper

RATE = 0.1
SGD = torch.optim.SGD

laws = settings(deadline=None)
steps = st.integers(0, 40)
betas = st.floats(0, 0.95)
schedules = st.lists(st.floats(0, 2), max_size=20)


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-12, abs=1e-15)


def velocity(rho: float, step: int) -> float:
    """Return 1 + rho + ... + rho^(step - 1): the momentum buffer at the step, counted from 1."""
    return (1 - rho**step) / (1 - rho)


@laws
@given(schedules)
def test_sgd_goes_the_sum_of_its_rates(factors: list[float]):
    assert EffectiveSteps(partial(SGD, lr=RATE)).displacement(tuple(factors)) == close(RATE * math.fsum(factors))


@laws
@given(steps, betas)
def test_momentum_goes_the_norm_of_fednova(tau: int, rho: float):
    """It is eta ||a||_1 = eta (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho), Wang et al. 2020."""
    norm = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
    assert EffectiveSteps(partial(SGD, lr=RATE, momentum=rho)).displacement((1.0,) * tau) == pytest.approx(
        RATE * norm, abs=1e-12
    )


@laws
@given(steps, st.floats(0.01, 0.95))
def test_nesterov_looks_ahead_by_one_step(tau: int, rho: float):
    """Each step is 1 + rho v_t: together the tau steps, and rho times the displacement of momentum."""
    norm = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
    way = EffectiveSteps(partial(SGD, lr=RATE, momentum=rho, nesterov=True)).displacement((1.0,) * tau)
    assert way == pytest.approx(RATE * (tau + rho * norm), abs=1e-12)


@laws
@given(schedules, st.floats(0.01, 0.95))
def test_schedules_weigh_the_steps_of_momentum(factors: list[float], rho: float):
    """It is sum_t eta_t v_t: the rate of a step multiplies the momentum of all steps before it."""
    expected = math.fsum(RATE * factor * velocity(rho, t) for t, factor in enumerate(factors, 1))
    assert EffectiveSteps(partial(SGD, lr=RATE, momentum=rho)).displacement(tuple(factors)) == close(expected)


@laws
@given(steps, st.floats(0.01, 5))
def test_a_pull_brings_it_back(tau: int, mu: float):
    """It is (1 - (1 - eta mu)^tau) / mu, eta times the proximal norm of Wang et al. 2020."""
    expected = (1 - (1 - RATE * mu) ** tau) / mu
    assert EffectiveSteps(partial(SGD, lr=RATE), proximal_mu=mu).displacement((1.0,) * tau) == pytest.approx(
        expected, rel=1e-10
    )


@laws
@given(schedules, st.floats(0.01, 4))
def test_schedules_weigh_a_pull(factors: list[float], mu: float):
    """It is (1 - prod_t (1 - eta_t mu)) / mu."""
    expected = (1 - math.prod(1 - RATE * factor * mu for factor in factors)) / mu
    assert EffectiveSteps(partial(SGD, lr=RATE), proximal_mu=mu).displacement(tuple(factors)) == pytest.approx(
        expected, rel=1e-9, abs=1e-14
    )


@laws
@given(schedules, st.floats(0, 0.95), st.floats(-3, 3))
def test_the_way_is_in_proportion_to_the_gradient(factors: list[float], rho: float, gradient: float):
    probe = EffectiveSteps(partial(SGD, lr=RATE, momentum=rho))
    assert probe.displacement(tuple(factors), gradient) == close(gradient * probe.displacement(tuple(factors)))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_weight_decay_is_left_out(options: dict[str, float]):
    """It is a part of the clients' gradients."""
    with_it, without = (partial(SGD, lr=RATE, weight_decay=decay, **options) for decay in (0.5, 0.0))
    assert EffectiveSteps(with_it).displacement((1.0, 0.5, 2.0)) == EffectiveSteps(without).displacement(
        (1.0, 0.5, 2.0)
    )


def test_every_way_begins_anew():
    """Repeated calls start without momentum, for any number of steps."""
    probe = EffectiveSteps(partial(SGD, lr=RATE, momentum=0.5))
    assert [probe.displacement((1.0,) * tau) for tau in (1, 2, 1)] == [close(0.1), close(0.25), close(0.1)]


LINEAR: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(SGD, lr=RATE),
    "momentum": partial(SGD, lr=RATE, momentum=0.9),
    "nesterov": partial(SGD, lr=RATE, momentum=0.9, nesterov=True),
    "dampening": partial(SGD, lr=RATE, momentum=0.9, dampening=0.5),
    "weight_decay": partial(SGD, lr=RATE, weight_decay=0.1),
    "fused": partial(SGD, lr=RATE, momentum=0.9, fused=True),
}
NONLINEAR: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": partial(torch.optim.Adam, lr=RATE),
    "AdamW": torch.optim.AdamW,
    "RMSprop": partial(torch.optim.RMSprop, lr=RATE, momentum=0.9),
    "Adagrad": partial(torch.optim.Adagrad, lr=RATE),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_is_accepted(name: str):
    """Twice the gradient gives twice the displacement, also with a schedule."""
    assert not nonlinear_optimizer("scaffold", LINEAR[name], GradientClipper())
    way, twice = (EffectiveSteps(LINEAR[name]).displacement((1.0, 0.3, 0.7), gradient) for gradient in (1.0, 2.0))
    assert way > 0 and twice == pytest.approx(2 * way, rel=1e-12)


@pytest.mark.parametrize("name", NONLINEAR)
def test_adaptive_optimizers_are_refused(name: str):
    """The message names the algorithm, the optimizer, and a remedy."""
    (message,) = nonlinear_optimizer("scaffold", NONLINEAR[name], GradientClipper())
    assert message.startswith("algorithm=scaffold needs an optimizer whose step is linear in the gradient")
    assert f"with {name} twice the gradient is not twice the step" in message
    assert "set optimizer=sgd or optimizer=momentum, or algorithm=fedavg" in message


def test_an_optimizer_of_matrices_is_refused_in_its_own_words():
    (message,) = nonlinear_optimizer("fednova", partial(torch.optim.Muon, lr=RATE), GradientClipper())
    assert re.search(r"Muon cannot step a single number \(.+\)\.\n  set optimizer=sgd", message)


def test_clipping_is_refused():
    """It is refused for any norm, since nobody can know that a norm is never reached."""
    (message,) = nonlinear_optimizer("fednova", LINEAR["sgd"], GradientClipper(1e9))
    assert message.startswith("clip.max_norm=1e+09 with algorithm=fednova")
    assert "set clip.max_norm=null, or algorithm=fedavg" in message
