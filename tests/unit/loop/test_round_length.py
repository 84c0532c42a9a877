"""The length of a client's round, and its batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.algorithms.round import Round
from trainer.loop.options import RoundOptions

few = st.integers(1, 6)
seeds = st.integers(0, 10**6)
spans = st.tuples(few, st.integers(0, 4)).map(lambda pair: (pair[0], sum(pair)))
choices = st.fixed_dictionaries({"epochs": few | spans, "steps": st.none() | st.integers(1, 20)})


def round_of(index: int, seed: int = 0) -> Round:
    return Round(index, seed, ())


@settings(deadline=None)
@given(spans, few, seeds, st.integers(0, 100), st.integers(0, 100))
def test_epochs_are_drawn_in_their_range(epochs: tuple[int, int], in_one: int, seed: int, index: int, client: int):
    """They are whole, and the same at every call; they do not depend on the cohort."""
    length = RoundOptions(epochs)
    steps = length.num_steps(in_one, round_of(index, seed), client)
    drawn, rest = divmod(steps, in_one)
    assert rest == 0 and epochs[0] <= drawn <= epochs[1]
    assert steps == RoundOptions(epochs).num_steps(in_one, Round(index, seed, (client, 101)), client)
    assert drawn == length.num_steps(1, round_of(index, seed), client)


def test_epochs_are_drawn_evenly_and_apart():
    """In 3000 draws over clients, rounds or seeds, each of 2 to 5 comes 750 times, within 4 times sqrt(3000 3/16)."""
    length = RoundOptions((2, 5))
    for draws in (
        [length.num_steps(1, round_of(0), client) for client in range(3000)],
        [length.num_steps(1, round_of(index), 0) for index in range(3000)],
        [length.num_steps(1, round_of(0, seed), 0) for seed in range(3000)],
    ):
        counts = np.bincount(draws, minlength=6)[2:]
        assert len(counts) == 4 and abs(counts - 750).max() < 4 * np.sqrt(3000 * 3 / 16)


def test_golden_epochs():
    """Resumed runs must draw the same numbers in any later version."""
    length = RoundOptions((2, 5))
    drawn = [[length.num_steps(1, round_of(index), client) for client in range(6)] for index in range(2)]
    assert drawn == [[4, 2, 2, 3, 3, 5], [2, 5, 3, 2, 2, 2]]


@settings(deadline=None)
@given(choices, st.integers(0, 5), few, seeds)
def test_no_batch_is_of_two_rounds(chosen: dict[str, Any], synchronous: int, in_one: int, seed: int):
    """The rounds of a client that always takes part follow each other in its stream of batches."""
    length = RoundOptions(**chosen, sync_rounds=synchronous)
    assert_apart(length, in_one, [round_of(index, seed) for index in range(8)])


@settings(deadline=None)
@given(choices, few, st.sets(st.integers(0, 50), min_size=2), seeds)
def test_no_batch_is_of_two_rounds_of_a_client_that_comes_and_goes(
    chosen: dict[str, Any], in_one: int, there: set[int], seed: int
):
    """Its position in the stream depends on the number of its rounds, not on their indices."""
    assert_apart(RoundOptions(**chosen), in_one, [round_of(index, seed) for index in sorted(there)])


def assert_apart(length: RoundOptions, in_one: int, rounds: list[Round]) -> None:
    """Assert that the batches [begin, begin + steps) of a client's rounds do not overlap, and the first begins at 0."""
    begins = [length.first_step(in_one, earlier) for earlier in range(len(rounds) + 1)]
    ends = [begin + length.num_steps(in_one, round, 3) for begin, round in zip(begins, rounds, strict=False)]
    assert begins[0] == 0
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=True))


@settings(deadline=None)
@given(few, st.none() | st.integers(1, 20), st.integers(0, 5), few)
def test_no_batch_is_left_out_where_nothing_is_drawn(epochs: int, steps: int | None, synchronous: int, in_one: int):
    """Each round begins where the last one ended, also after synchronous rounds, and across epochs."""
    length, place = RoundOptions(epochs, steps, synchronous), 0
    for index in range(synchronous + 3):
        assert length.first_step(in_one, index) == place
        place += length.num_steps(in_one, round_of(index), 0)


@pytest.mark.parametrize("chosen", [{"steps": 4}, {"epochs": 2}, {"epochs": (2, 3)}], ids=["steps", "epochs", "drawn"])
def test_synchronous_rounds_are_of_one_step(chosen: dict[str, Any]):
    """The first three rounds have one step for every client; the later ones have the configured number."""
    length = RoundOptions(**chosen, sync_rounds=3)
    steps = [[length.num_steps(5, round_of(index), client) for client in range(20)] for index in range(5)]
    assert steps[:3] == [[1] * 20] * 3
    later = {4} if "steps" in chosen else {10, 15} if isinstance(chosen["epochs"], tuple) else {10}
    assert set(steps[3]) == set(steps[4]) == later
    assert [length.first_step(5, earlier) for earlier in range(4)] == [0, 1, 2, 3]
