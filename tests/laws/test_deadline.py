"""Silos that reach the deadline of a round: finished steps count or are dropped, and nobody waits for the rest."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.laws.cases import (
    EXACT,
    FEDERATED,
    Only,
    assert_close,
    assert_same,
    fednova,
    tiny_data,
    tiny_model,
    train,
)
from tests.laws.heterogeneity import (
    DEADLINE,
    DONE,
    EVERYONE,
    OTHER,
    SLOW,
    START,
    STEPS,
    WEIGHTS,
    Costly,
    Planned,
    assert_same_run,
    by_clock,
    point_choices,
    reported,
    slow_choices,
    timed,
    walk,
    way,
    without,
)
from tests.laws.test_midround import assert_left_and_bit_equal
from trainer.loop.options import RoundOptions


@pytest.mark.parametrize("name", FEDERATED)
@pytest.mark.quick_rows(7)
def test_what_a_late_client_has_done_counts(ranks, name: str):
    """Two of its four steps: bit for bit a run in which it was to take two."""
    ours = ranks(2).run(by_clock, train, name, 2, slow_choices(SLOW))
    theirs = ranks(2).run(train, name, 2, slow_choices(round=Planned(steps=STEPS, steps_of={SLOW: DONE})))
    assert reported(ours, "clients/stragglers") == [1, 1] and reported(theirs, "clients/stragglers") == [0, 0]
    assert reported(ours, "round/steps") == reported(theirs, "round/steps") == [26, 26]
    assert_same_run(ours, theirs, assert_same)


@pytest.mark.parametrize("name", [*EXACT, "topk", "int4_scaffold"])  # clients have the same silos in both runs
@pytest.mark.quick_rows(7)
def test_a_late_client_that_is_dropped_was_never_there(ranks, name: str):
    """The run is that of the others, also if its silo contributes nothing, and if it is in time again."""
    cohorts = [EVERYONE, (SLOW, OTHER), EVERYONE], [without(SLOW), (OTHER,), without(SLOW)]
    choices = [
        {"round": replace(DEADLINE, stragglers="drop"), "rounds": 3, "client_sampling": Only(tuple(c))} for c in cohorts
    ]
    ours = ranks(2).run(by_clock, train, name, 2, slow_choices(SLOW, **choices[0]))
    theirs = ranks(2).run(by_clock, train, name, 2, slow_choices(SLOW, **choices[1]))
    assert reported(ours, "clients/stragglers") == [1, 1, 1] and reported(theirs, "clients/stragglers") == [0, 0, 0]
    assert reported(ours, "clients/nonfinite") == [0, 0, 0] and reported(ours, "round/steps") == [26, 6, 26]
    assert_same_run(ours, theirs, assert_close)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fednova", "krum", "diloco"])
def test_clients_that_were_not_begun_are_late_too(ranks, name: str):
    """The first silo has clients 0, 3, 4 and 5; there is not enough time for the second of them."""
    ours = ranks(2).run(by_clock, train, name, 2, slow_choices(3, rounds=1))
    choices = {
        "round": Planned(steps=STEPS, steps_of={3: DONE}),
        "client_sampling": Only((without(4, 5),)),
        "rounds": 1,
    }
    assert reported(ours, "clients/stragglers") == [3] and reported(ours, "clients/trained") == [5]
    assert_same_run(ours, ranks(2).run(train, name, 2, slow_choices(**choices)), assert_close)


def test_a_client_that_ends_after_the_deadline_is_the_last(ranks):
    """Rounds have one step, which takes twice the time: each silo trains its first client; the other five are late."""
    length = RoundOptions(steps=1, deadline_seconds=0.5)
    ours = ranks(2).run(by_clock, train, "fedavg", 2, slow_choices(*EVERYONE, round=length))
    assert reported(ours, "clients/trained") == [2, 2] and reported(ours, "clients/stragglers") == [5, 5]


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "diloco"])
def test_replicas_of_a_silo_stop_on_the_same_step(ranks, name: str):
    """Some batches have examples on one replica only, so their clocks differ. The evaluation checks that they agree."""
    length = RoundOptions(steps=8, deadline_seconds=DONE - 0.5)
    ours = ranks(4).run(by_clock, train, name, [2, 2], slow_choices(SLOW, round=length, rounds=1))
    done = reported(ours, "round/steps")[0] - 6 * 8
    assert reported(ours, "clients/stragglers") == [1] and DONE <= done < 6
    length = Planned(steps=8, steps_of={SLOW: done})
    assert_same_run(ours, ranks(4).run(train, name, [2, 2], slow_choices(round=length, rounds=1)), assert_same)


def test_replicas_are_not_late_for_the_deadline_of_an_earlier_round(ranks):
    """The slow client takes part only in the first round; in the later ones each client takes all its steps."""
    choices = slow_choices(SLOW, client_sampling=Only((EVERYONE, (0, 1, 2))), rounds=3)
    ours = ranks(4).run(by_clock, train, "fedavg", [2, 2], choices)
    assert reported(ours, "clients/stragglers") == [1, 0, 0]
    assert reported(ours, "round/steps")[1:] == [3 * STEPS, 3 * STEPS]


@pytest.mark.parametrize("late", ["keep", "drop"])
@pytest.mark.parametrize("bad", [OTHER, SLOW], ids=["of_the_other_silo", "the_same"])
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fednova", "median", "local"])
@pytest.mark.quick_rows(6)
def test_a_late_client_and_one_without_numbers(ranks, name: str, bad: int, late: Any):
    """A late client and one with NaN in the same round, in two silos or in one: neither affects the other."""
    length = replace(DEADLINE, stragglers=late)
    ours = ranks(2).run(by_clock, train, name, 2, slow_choices(SLOW, bad=bad, round=length))
    cohort = Only((without(bad, SLOW) if late == "drop" else without(bad),))
    theirs = ranks(2).run(by_clock, train, name, 2, slow_choices(SLOW, round=length, client_sampling=cohort))
    assert reported(ours, "clients/stragglers") == [1, 1]
    assert reported(ours, "clients/nonfinite") == [0 if bad == SLOW and late == "drop" else 1] * 2
    assert_same_run(ours, theirs, assert_close)


@pytest.mark.parametrize(("name", "late"), [("scaffold", "keep"), ("krum", "drop"), ("diloco", "drop")])
def test_a_silo_that_was_late_stays_so_when_the_run_goes_on(ranks, name: str, late: Any, tmp_path: Path):
    """The first silo has reached its deadline when the second is preempted: both resume bit-equal, and as late."""
    choices = slow_choices(3, round=replace(DEADLINE, stragglers=late), rounds=4)
    pool = SimpleNamespace(run=partial(ranks(2).run, by_clock))
    assert_left_and_bit_equal(pool, name, 2, choices, tmp_path, {1: (1, 2)})


def test_seconds_are_those_of_the_wall(ranks):
    """A hundred steps of a tenth of a second are cut off after half a second. The other silo takes one step."""
    choices = {
        "sizes": [400, 4],
        "module": Costly(tiny_model().double(), by_wall=True),
        "data": timed(tiny_data(404), [400, 4], [0], 0.1),
        "round": RoundOptions(deadline_seconds=0.45),
        "rounds": 1,
    }
    ours = ranks(2).run(train, "fedavg", 2, choices)
    assert reported(ours, "clients/stragglers") == [1]
    assert 1 + 1 <= reported(ours, "round/steps")[0] <= 5 + 1
    assert reported(ours, "seconds/round")[0] >= 0.45


def test_fednova_divides_by_the_steps_that_were_done(ranks):
    """The late client takes two steps, the others four: w <- w - a sum_k p_k (w - w_k) / a_k."""
    ours = ranks(2).run(by_clock, train, "fedavg", 2, point_choices(SLOW, algorithm=fednova(), round=DEADLINE))
    steps, place = [DONE if client == SLOW else STEPS for client in EVERYONE], START
    ways = np.array([way(number) for number in steps])
    for _ in reported(ours, "clients/stragglers"):
        ends = np.stack([walk(client, place, steps=steps[client])[0] for client in EVERYONE])
        place = place - WEIGHTS @ ways * (WEIGHTS / ways) @ (place - ends)
    assert reported(ours, "clients/stragglers") == [1, 1]
    np.testing.assert_allclose(ours[0].model["inner.place"], place, rtol=1e-12)
