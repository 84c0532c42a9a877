"""Median, trimmed mean and Krum against numpy, coordinate by coordinate, and against clients that send anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws.cases import SIZES, Only, robust
from tests.laws.quadratics import BOWLS, EVERYONE, START, Bowls, Walk, bowl_choices, path, trajectory
from trainer.algorithms import FedAvg, Krum, Median, TrimmedMean
from trainer.algorithms.aggregation_rule import AggregationRule
from trainer.algorithms.robust import trimmed_mean
from trainer.distributed.silos import SiloSpec
from trainer.loop.assignment import assign_clients

ROUNDS, BAD = 3, 2
Combine = Callable[[np.ndarray], np.ndarray]


def trimmed(rows: np.ndarray, trim: float) -> np.ndarray:
    """Return the mean of each column's sorted values, without the first and last floor(trim K)."""
    left_out = math.floor(trim * len(rows))
    return np.sort(rows, axis=0)[left_out : len(rows) - left_out].mean(0)


def naive_krum(rows: np.ndarray, byzantine: int, selected: int) -> np.ndarray:
    """Return Krum by Blanchard et al. 2017: the score of i is the sum of |V_i - V_j|^2 over the K - f - 2 closest j."""
    scores = []
    for i, row in enumerate(rows):
        distances = sorted(((row - other) ** 2).sum() for j, other in enumerate(rows) if j != i)
        scores.append(sum(distances[: max(len(rows) - byzantine - 2, 1)]))
    best = sorted(range(len(rows)), key=lambda i: (scores[i], i))[:selected]
    return rows[best].mean(0)


RULES: dict[str, tuple[AggregationRule, Combine]] = {
    "median": (Median(), lambda rows: np.median(rows, axis=0)),
    "trimmed_mean": (TrimmedMean(0.2), partial(trimmed, trim=0.2)),
    "trimmed_more": (TrimmedMean(0.45), partial(trimmed, trim=0.45)),
    "krum": (Krum(1), partial(naive_krum, byzantine=1, selected=1)),
    "multi_krum": (Krum(2, 3), partial(naive_krum, byzantine=2, selected=3)),
}


def expected(rule: Combine, clients: tuple[int, ...]) -> np.ndarray:
    """Return the global points after each round, from the deltas of these clients."""
    found, place = [], START
    for _ in range(ROUNDS):
        place = place - rule(Walk().deltas(place, clients))
        found.append(place)
    return np.stack(found)


def ranks_of(silos: SiloSpec) -> int:
    return 2 if silos == 2 else 4


# Two silos with unequal numbers of clients; with unequal numbers of ranks; three, which do not divide 8 coordinates.
layouts = pytest.mark.parametrize("silos", [2, [3, 1], [2, 1, 1]], ids=["2", "3+1", "2+1+1"])
rules = pytest.mark.parametrize("name", RULES)


def test_the_silos_have_unequal_numbers_of_clients():
    assert [len(mine) for mine in assign_clients(EVERYONE, SIZES, [1, 1])] == [4, 3]


@layouts
@rules
@pytest.mark.quick_rows(4)
def test_all_clients_are_combined(ranks, name: str, silos: SiloSpec):
    """After three rounds of 7 clients every rank has the same bits."""
    ours_by, rule = RULES[name]
    by_rank = ranks(ranks_of(silos)).run(path, silos, robust(ours_by), bowl_choices(rounds=ROUNDS))
    np.testing.assert_allclose(by_rank[0], expected(rule, EVERYONE), rtol=1e-12, atol=1e-12)
    assert all(np.array_equal(other, by_rank[0]) for other in by_rank)


@layouts
@rules
@pytest.mark.quick_rows(7)
def test_a_nan_client_is_left_out(ranks, name: str, silos: SiloSpec):
    """The rules see the other six; the median of six values is the mean of the middle two."""
    ours_by, rule = RULES[name]
    choices = bowl_choices(bowls=BOWLS.moved(BAD, math.nan), rounds=ROUNDS, max_nonfinite_rounds=9)
    outcomes = ranks(ranks_of(silos)).run(trajectory, silos, robust(ours_by), choices)[0]
    others = tuple(client for client in EVERYONE if client != BAD)
    places = [one.model["place"] for one in outcomes]
    np.testing.assert_allclose(places, expected(rule, others), rtol=1e-12, atol=1e-12)
    assert outcomes[0].rounds[0]["clients/nonfinite"] == 1


@pytest.mark.parametrize("cohort", [(4,), (1, 5), (0, 1, 3)], ids=str)
@rules
def test_few_clients_are_combined(ranks, name: str, cohort: tuple[int, ...]):
    """A silo without a client sends no rows; Krum of fewer than f + 3 clients uses one neighbour."""
    ours_by, rule = RULES[name]
    choices = bowl_choices(rounds=ROUNDS, client_sampling=Only((cohort,)))
    ours = ranks(2).run(path, 2, robust(ours_by), choices)[0]
    np.testing.assert_allclose(ours, expected(rule, cohort), rtol=1e-12, atol=1e-12)


def test_the_server_moves_by_the_rules_delta(ranks):
    """Nesterov's momentum on the median: b <- 0.9 b + d; w <- w - 0.7 (d + 0.9 b)."""
    server = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    algorithm = robust(Median(), server=server)
    ours = ranks(2).run(path, 2, algorithm, bowl_choices(rounds=ROUNDS))[0]
    place, velocity = START, np.zeros_like(START)
    for reached in ours:
        delta = np.median(Walk().deltas(place), axis=0)
        velocity = 0.9 * velocity + delta
        place = place - 0.7 * (delta + 0.9 * velocity)
        np.testing.assert_allclose(reached, place, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [TrimmedMean(0.0), Krum(1, len(SIZES))],
    ids=["trim nothing", "select all"],
)
def test_leaving_nobody_out_is_fedavg_with_equal_weights(ranks, rule: AggregationRule):
    algorithms = robust(rule), partial(FedAvg, weighting="equal")
    ours, theirs = (ranks(2).run(path, 2, algorithm, bowl_choices(rounds=ROUNDS))[0] for algorithm in algorithms)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def within(place: np.ndarray, before: np.ndarray, honest: tuple[int, ...]) -> bool:
    """Return whether every coordinate moved within the range of the honest clients' updates."""
    deltas, slack = Walk().deltas(before, honest), 1e-9
    moved = before - place
    return bool(((deltas.min(0) - slack <= moved) & (moved <= deltas.max(0) + slack)).all())


def spoilt(liars: tuple[int, ...], far: float) -> Bowls:
    """Return the bowls, with those of the liars around one distant point."""
    bowls = BOWLS
    for liar in liars:
        bowls = bowls.moved(liar, far)
    return bowls


BYZANTINE: dict[str, AggregationRule] = {
    "median": Median(),
    "trimmed_mean": TrimmedMean(0.3),
    "krum": Krum(2),
    "multi_krum": Krum(2, 3),
}


@pytest.mark.parametrize("far", [1e3, -1e9, 1e30])
@pytest.mark.parametrize("liars", [(3,), (0, 3)], ids=["one", "two of one mind"])
@pytest.mark.parametrize("name", BYZANTINE)
@pytest.mark.quick_rows(10)
def test_liars_do_not_carry_the_model_away(ranks, name: str, liars: tuple[int, ...], far: float):
    """In no round and no coordinate does the model leave the honest clients' range; two liars agree with each other."""
    honest = tuple(client for client in EVERYONE if client not in liars)
    choices = bowl_choices(bowls=spoilt(liars, far), rounds=ROUNDS)
    ours = ranks(2).run(path, 2, robust(BYZANTINE[name]), choices)[0]
    for before, place in zip([START, *ours], ours, strict=False):
        assert within(place, before, honest)


@pytest.mark.parametrize("far", [1e3, -1e9, 1e30])
def test_a_liar_carries_fedavg_away(ranks, far: float):
    """The law above is not trivial: the mean follows the liar."""
    ours = ranks(2).run(path, 2, FedAvg, bowl_choices(bowls=spoilt((3,), far), rounds=1))[0]
    assert not within(ours[0], START, tuple(client for client in EVERYONE if client != 3))
    assert np.abs(ours[0]).max() > abs(far) / 100


def tables(values: st.SearchStrategy[float], most: int = 9) -> st.SearchStrategy[np.ndarray]:
    """Rows [clients, coordinates] of up to `most` clients and 5 coordinates."""
    shapes = st.tuples(st.integers(1, most), st.integers(1, 5))
    return shapes.flatmap(
        lambda shape: st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
            lambda numbers: np.array(numbers).reshape(shape)
        )
    )


laws = settings(deadline=None)
numbers = st.floats(-1e6, 1e6)


@laws
@given(tables(numbers))
def test_trimming_a_half_is_the_median(rows: np.ndarray):
    np.testing.assert_allclose(trimmed_mean(torch.from_numpy(rows), 0.5), np.median(rows, axis=0), rtol=1e-14)


@laws
@given(tables(numbers), st.floats(0, 0.499))
def test_the_trimmed_mean_is_that_of_the_sorted_rest(rows: np.ndarray, trim: float):
    ours = trimmed_mean(torch.from_numpy(rows), trim).numpy()
    np.testing.assert_allclose(ours, trimmed(rows, trim), rtol=1e-12, atol=1e-9)


@laws
@given(tables(numbers), st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5]), st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(rows: np.ndarray, trim: float, random: Any):
    shuffled = rows[random.sample(range(len(rows)), len(rows))]
    ours, theirs = (trimmed_mean(torch.from_numpy(table), trim) for table in (rows, shuffled))
    assert torch.equal(ours, theirs)


whole_numbers = st.integers(-9, 9).map(float)  # their distances are exact, so that ties stay ties


@laws
@given(tables(whole_numbers), st.integers(0, 4), st.integers(1, 4))
def test_krum_is_the_naive_one(rows: np.ndarray, byzantine: int, selected: int):
    """Rows or scores may be equal: the first of them is taken."""
    ours = Krum(byzantine, selected).combine(torch.from_numpy(rows), lambda tensor: tensor).numpy()
    np.testing.assert_allclose(ours, naive_krum(rows, byzantine, selected), rtol=1e-14)


@laws
@given(tables(whole_numbers), st.integers(0, 5), st.integers(1, 3))
def test_krum_of_parts_is_the_parts_of_krum(rows: np.ndarray, cut: int, selected: int):
    """Two silos with some coordinates each: the sum of their distances selects the same clients in both."""
    parts = [torch.from_numpy(part.copy()) for part in np.split(rows, [min(cut, rows.shape[1])], axis=1)]
    partial_sums: list[torch.Tensor] = []
    for part in parts:
        Krum(1, selected).combine(part, lambda tensor: partial_sums.append(tensor) or tensor)
    total = torch.stack(partial_sums).sum(0)
    joined = torch.cat([Krum(1, selected).combine(part, lambda tensor: total) for part in parts])
    np.testing.assert_allclose(joined, naive_krum(rows, 1, selected), rtol=1e-14)
