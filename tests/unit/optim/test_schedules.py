"""Schedules: factors on the learning rate by progress."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.optim.schedules import Constant, Cosine, Linear, Step, WarmupStableDecay

fractions = st.floats(0, 1)


@settings(deadline=None)
@given(fractions)
def test_constant_is_one(progress: float):
    assert Constant()(progress) == 1.0


def test_cosine_without_warmup_starts_at_one_and_ends_at_final():
    assert Cosine()(0.0) == 1.0
    assert Cosine()(0.5) == pytest.approx(0.5)
    assert Cosine()(1.0) == pytest.approx(0.0, abs=1e-15)
    assert Cosine(final_lr_fraction=0.1)(1.0) == pytest.approx(0.1)


def test_warmup_is_linear_from_zero_and_meets_the_cosine_at_one():
    schedule = Cosine(warmup_fraction=0.2, final_lr_fraction=0.1)
    assert schedule(0.0) == 0.0
    assert schedule(0.1) == pytest.approx(0.5)
    assert schedule(0.2 - 1e-12) == pytest.approx(1.0)
    assert schedule(0.2) == 1.0
    assert schedule(0.6) == pytest.approx(0.55)
    assert schedule(1.0) == pytest.approx(0.1)


def test_the_whole_run_may_be_warmup():
    assert Cosine(warmup_fraction=1.0)(0.25) == 0.25
    assert Cosine(warmup_fraction=1.0)(1.0) == 1.0


@settings(deadline=None)
@given(st.floats(0, 0.9), fractions, fractions)
def test_cosine_follows_its_formula(warmup: float, final: float, progress: float):
    """It is final + (1 - final) (1 + cos(pi t)) / 2, with t the progress of the decay."""
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


@settings(deadline=None)
@given(st.floats(0, 0.9), fractions, fractions)
def test_linear_is_a_line_from_one_to_final(warmup: float, final: float, part: float):
    progress = warmup + part * (1 - warmup)
    assert Linear(warmup, final)(progress) == pytest.approx(1 + (final - 1) * part, abs=1e-9)


@settings(deadline=None)
@given(st.floats(0.01, 0.5), st.floats(0.01, 0.5), fractions, fractions)
def test_warmup_stable_decay_has_three_phases(warmup: float, decay: float, final: float, part: float):
    """It is progress / warmup, then 1, then linear to final."""
    schedule = WarmupStableDecay(warmup, decay, final)
    assert schedule(part * warmup) == pytest.approx(part, abs=1e-9)
    assert schedule(warmup + part * (1 - warmup - decay)) == pytest.approx(1.0, abs=1e-9)
    assert schedule(1 - decay + part * decay) == pytest.approx(1 + (final - 1) * part, abs=1e-9)


def test_without_a_decay_it_stays_at_one():
    assert WarmupStableDecay(0.1, 0.0)(0.999) == 1.0
    assert WarmupStableDecay(0.5, 0.5, 0.25)(1.0) == 0.25


@settings(deadline=None)
@given(fractions, fractions, fractions, fractions)
def test_linear_rises_then_falls_and_stays_within_bounds(warmup: float, final: float, a: float, b: float):
    schedule = Linear(warmup, final)
    low, high = sorted((a, b))
    assert 0 <= schedule(a) <= 1
    if high < warmup:
        assert schedule(low) <= schedule(high)
    elif low >= warmup:
        assert schedule(low) >= schedule(high) >= final - 1e-12


@settings(deadline=None)
@given(st.lists(fractions, max_size=4), fractions, fractions)
def test_step_is_the_factor_to_the_power_of_the_milestones_passed(milestones: list[float], factor: float, place: float):
    passed = len([milestone for milestone in milestones if milestone <= place])
    assert Step(milestones, factor)(place) == factor**passed


def test_step_changes_at_its_milestones():
    assert [Step()(progress) for progress in (0.0, 0.49, 0.5, 0.74, 0.75)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("kind", [Cosine, Linear, WarmupStableDecay, Step])
@pytest.mark.parametrize("name", ["warmup", "final", "decay", "factor"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_values_outside_0_to_1_are_refused(kind: type, name: str, value: float):
    if name in kind.__dataclass_fields__:
        with pytest.raises(ValueError, match=rf"schedule\.{name}="):
            kind(**{name: value})


def test_phases_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match="no more than 1 together"):
        WarmupStableDecay(0.6, 0.5)
    with pytest.raises(ValueError, match=r"schedule\.milestones\[1\]=30"):
        Step([0.5, 30])
