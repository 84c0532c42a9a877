"""Clipping against its formulas in numpy: min(1, limit / norm) times the gradient, and numbers held to a magnitude."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer.optim import GradientClipper

numbers = st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3)
limits = st.none() | st.floats(0.01, 5)
orders = st.sampled_from([1.0, 2.0, math.inf])


def clipped(clip: GradientClipper, gradient: np.ndarray, measure: bool) -> tuple[float, np.ndarray]:
    """The norm that is told, and the gradient after, of three numbers in two parameters and one that has none."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor(gradient[:2]), torch.tensor(gradient[2:])
    norm = float(clip(parameters, measure))
    return norm, torch.cat([parameters[0].grad, parameters[1].grad]).numpy()


@settings(deadline=None)
@given(numbers, limits, limits, orders)
def test_numbers_are_held_first_then_the_norm(
    values: list[float], norm: float | None, value: float | None, order: float
):
    gradient = np.array(values, dtype=np.float32)
    told, after = clipped(GradientClipper(norm, order if norm else 2.0, value), gradient, measure=True)
    assert told == pytest.approx(np.linalg.norm(gradient, order if norm else 2.0), rel=1e-5)
    held = gradient if value is None else gradient.clip(-value, value)
    if norm is not None:
        held = held * min(1.0, norm / (np.linalg.norm(held, order) + 1e-6))
    np.testing.assert_allclose(after, held, rtol=1e-5, atol=1e-6)


def test_the_norm_costs_nothing_where_nobody_wants_it():
    gradient = np.array([3.0, 4.0, 0.0], dtype=np.float32)
    assert clipped(GradientClipper(), gradient, measure=False)[0] == 0.0
    assert clipped(GradientClipper(), gradient, measure=True)[0] == 5.0
    assert clipped(GradientClipper(max_value=1.0), gradient, measure=False)[0] == 0.0
    assert clipped(GradientClipper(max_norm=1.0), gradient, measure=False)[0] == 5.0


def test_an_order_without_a_norm_is_refused():
    with pytest.raises(ValueError, match=r"clip.norm_type=inf with clip.max_norm=null"):
        GradientClipper(norm_type=math.inf)


def test_what_limits_is_said_as_it_is_typed():
    assert GradientClipper().settings == []
    assert GradientClipper(1.0, 1.0, 0.5).settings == ["clip.max_norm=1", "clip.max_value=0.5"]
