"""Schedules: factors on the learning rate by progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.optim import GroupedOptimizerFactory, Muon
from trainer.optim.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Linear,
    OneCycle,
    Schedule,
    Scheduler,
    Step,
    WarmupStableDecay,
)
from trainer.utils.errors import InputError

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


def groups_by_step(optimizer: torch.optim.Optimizer, steps: int, advance: Callable[[int], None]) -> list[Any]:
    """Return learning rate and momentum of the groups at each step, which `advance` sets."""
    seen = []
    for step in range(steps):
        advance(step)
        seen.append([(group["lr"], group.get("betas", [group.get("momentum")])[0]) for group in optimizer.param_groups])
    return seen


def ours(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> list[Any]:
    scheduler = Scheduler(optimizer, schedule)
    return groups_by_step(optimizer, steps, lambda step: scheduler.set_progress(step / steps))


def torchs(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[Any]:
    def advance(step: int) -> None:
        if step:
            optimizer.step()
            scheduler.step()

    return groups_by_step(optimizer, steps, advance)


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(2, 2))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("warmup", [0.3, 0.25, 0.9])
def test_onecycle_is_torchs(kind: type[torch.optim.Optimizer], warmup: float):
    """Step by step, rates and momenta. Torch ends at its last step, ours with the run, which is one step later."""
    steps, rate = 20, 0.1
    theirs = kind([parameter()], lr=rate)
    pct_start = (warmup * steps + 1) / (steps + 1)
    expected = torchs(theirs, torch.optim.lr_scheduler.OneCycleLR(theirs, rate, steps + 1, pct_start=pct_start), steps)
    seen = ours(kind([parameter()], lr=rate), OneCycle(warmup), steps)
    for mine, other in zip(seen, expected, strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-12)
    assert OneCycle(warmup)(1.0) == pytest.approx(1 / (25 * 1e4))


@pytest.mark.parametrize(("cycles", "factor", "first"), [(4, 1, 30), (1, 1, 120), (3, 2, 17), (2, 3, 30), (7, 1, 13)])
def test_cosine_restarts_are_torchs(cycles: int, factor: int, first: int):
    """Also at the restarts, where a rounding would give the other end of a cycle."""
    steps = first * sum(factor**cycle for cycle in range(cycles))
    theirs = torch.optim.SGD([parameter()], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(theirs, first, factor, eta_min=0.05)
    expected = torchs(theirs, scheduler, steps)
    schedule = CosineRestarts(final_lr_fraction=0.1, cycles=cycles, cycle_factor=factor)
    seen = ours(torch.optim.SGD([parameter()], lr=0.5), schedule, steps)
    assert [group[0][0] for group in seen] == pytest.approx([group[0][0] for group in expected], rel=1e-12)
    assert schedule(1.0) == pytest.approx(0.1)


def test_rates_of_groups_keep_their_ratio_and_momentum_is_that_of_each_kind():
    """Muon has groups with a momentum and groups with betas."""
    make = GroupedOptimizerFactory(lambda groups: Muon(groups, lr=0.1), lr_multipliers=(("head", 10.0),))
    optimizer = make([("hidden", parameter()), ("head", parameter()), ("bias", torch.nn.Parameter(torch.zeros(2)))])
    Scheduler(optimizer, OneCycle(0.5)).set_progress(0.5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.1, 0.1, 1.0])
    assert {group["momentum"] for group in optimizer.param_groups if "momentum" in group} == {0.85}
    assert {group["betas"] for group in optimizer.param_groups if "betas" in group} == {(0.85, 0.95)}


def test_a_momentum_of_its_own_stays():
    optimizer = torch.optim.SGD([parameter()], lr=0.1, momentum=0.5)
    Scheduler(optimizer, OneCycle(base_momentum=None, max_momentum=None)).set_progress(0.3)
    assert optimizer.param_groups[0]["momentum"] == 0.5


def test_an_optimizer_without_momentum_is_refused():
    with pytest.raises(InputError, match="optimizer=Adagrad has none"):
        Scheduler(torch.optim.Adagrad([parameter()]), OneCycle())


@pytest.mark.parametrize(
    ("arguments", "key"), [({"base_momentum": None}, "base_momentum"), ({"max_momentum": 1.5}, "max_momentum")]
)
def test_onecycle_needs_two_momenta(arguments: dict[str, Any], key: str):
    with pytest.raises(ValueError, match=rf"schedule\.{key}="):
        OneCycle(**arguments)


def test_cycles_are_counted_from_one():
    with pytest.raises(ValueError, match=r"schedule\.cycles=0"):
        CosineRestarts(cycles=0)
