"""Clipping against numpy: min(1, max_norm / norm) times the gradient, and elements clipped to a magnitude."""

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
    """Return the norm and the clipped gradient of three numbers in two parameters, beside one without gradient."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor(gradient[:2]), torch.tensor(gradient[2:])
    norm = float(clip(parameters, measure))
    return norm, torch.cat([parameters[0].grad, parameters[1].grad]).numpy()


@settings(deadline=None)
@given(numbers, limits, limits, orders)
def test_values_are_clipped_before_the_norm(values: list[float], norm: float | None, value: float | None, order: float):
    gradient = np.array(values, dtype=np.float32)
    reported, after = clipped(GradientClipper(norm, order if norm else 2.0, value), gradient, measure=True)
    assert reported == pytest.approx(np.linalg.norm(gradient, order if norm else 2.0), rel=1e-5)
    expected = gradient if value is None else gradient.clip(-value, value)
    if norm is not None:
        expected = expected * min(1.0, norm / (np.linalg.norm(expected, order) + 1e-6))
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)


def test_the_norm_is_computed_only_if_needed():
    gradient = np.array([3.0, 4.0, 0.0], dtype=np.float32)
    assert clipped(GradientClipper(), gradient, measure=False)[0] == 0.0
    assert clipped(GradientClipper(), gradient, measure=True)[0] == 5.0
    assert clipped(GradientClipper(max_value=1.0), gradient, measure=False)[0] == 0.0
    assert clipped(GradientClipper(max_norm=1.0), gradient, measure=False)[0] == 5.0


def test_a_norm_type_without_max_norm_is_refused():
    with pytest.raises(ValueError, match=r"clip.norm_type=inf with clip.max_norm=null"):
        GradientClipper(norm_type=math.inf)


def test_settings_have_the_syntax_of_the_command_line():
    assert GradientClipper().settings == []
    assert GradientClipper(1.0, 1.0, 0.5).settings == ["clip.max_norm=1", "clip.max_value=0.5"]
