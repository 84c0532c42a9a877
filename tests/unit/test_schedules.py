"""Schedules: factors on the learning rate by progress."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.schedules import Constant, Cosine

fractions = st.floats(0, 1)


@settings(deadline=None)
@given(fractions)
def test_constant_is_one(progress: float):
    assert Constant()(progress) == 1.0


def test_cosine_without_warm_up_begins_at_one_and_ends_at_final():
    assert Cosine()(0.0) == 1.0
    assert Cosine()(0.5) == pytest.approx(0.5)
    assert Cosine()(1.0) == pytest.approx(0.0, abs=1e-15)
    assert Cosine(final=0.1)(1.0) == pytest.approx(0.1)


def test_warm_up_is_linear_from_zero_and_meets_the_cosine_at_one():
    schedule = Cosine(warmup=0.2, final=0.1)
    assert schedule(0.0) == 0.0
    assert schedule(0.1) == pytest.approx(0.5)
    assert schedule(0.2 - 1e-12) == pytest.approx(1.0)
    assert schedule(0.2) == 1.0
    assert schedule(0.6) == pytest.approx(0.55)
    assert schedule(1.0) == pytest.approx(0.1)


def test_all_of_the_run_may_be_warm_up():
    assert Cosine(warmup=1.0)(0.25) == 0.25
    assert Cosine(warmup=1.0)(1.0) == 1.0


@settings(deadline=None)
@given(st.floats(0, 0.9), fractions, fractions)
def test_cosine_is_half_a_wave(warmup: float, final: float, progress: float):
    """final + (1 - final) (1 + cos(pi t)) / 2, with t the part done of what comes after the warm-up."""
    after = warmup + progress * (1 - warmup)
    t = (after - warmup) / (1 - warmup)
    expected = final + (1 - final) * (1 + math.cos(math.pi * t)) / 2
    assert Cosine(warmup, final)(after) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(fractions, fractions, fractions, fractions)
def test_cosine_rises_then_falls_and_stays_within_bounds(warmup: float, final: float, a: float, b: float):
    schedule = Cosine(warmup, final)
    low, high = sorted((a, b))
    assert 0 <= schedule(a) <= 1 + 1e-12
    if high < warmup:
        assert schedule(low) <= schedule(high)
    elif low >= warmup:
        assert schedule(low) >= schedule(high) - 1e-12
        assert schedule(low) >= final - 1e-12


@pytest.mark.parametrize("name", ["warmup", "final"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_what_is_no_fraction_is_refused(name: str, value: float):
    with pytest.raises(ValueError, match=rf"schedule\.{name}="):
        Cosine(**{name: value})
