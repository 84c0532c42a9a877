"""Retention: the newest round checkpoints, the best, and the newest sections stay, so that a run can always resume."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.disk import (
    mid_round_name,
    round_name,
    save_mid_round_checkpoint,
    save_round,
    steps_of,
    writers,
)
from trainer.checkpoint import Checkpointer, checkpointer, newest_complete
from trainer.checkpoint.checkpointer import MID_ROUND_KEPT
from trainer.checkpoint.format import SavedState, find_saved
from trainer.checkpoint.resume import find_usable, round_folders
from trainer.distributed.topology import distributed

laws = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = (2, 1)  # of the silos that save


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a world of one rank, without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with distributed():
        yield


def names(folder: Path) -> list[str]:
    return [path.name for path in round_folders(folder)]


def after(*rounds: int) -> list[str]:
    return [round_name(each) for each in rounds]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_and_the_best_stay(tmp_path: Path, keep: int):
    """The best of rounds 1 to 8 are 2 and then 5: the file names it, and the previous best is removed."""
    ranks = writers(tmp_path, SIZES, keep)
    for rounds in range(1, 9):
        save_round(ranks[::-1], rounds, is_best=rounds in (2, 5))  # rank 0, which removes old ones, is the last
        best = 5 if rounds >= 5 else 2
        expected = set(range(max(1, rounds - keep + 1), rounds + 1)) | ({best} if rounds >= best else set())
        assert names(tmp_path) == after(*sorted(expected))
    assert (tmp_path / "best").read_text() == round_name(5)
    assert {path.name for path in tmp_path.iterdir()} == {"best", *names(tmp_path)}


def test_a_border_that_was_evaluated_follows_the_one_that_was_not(tmp_path: Path):
    ranks = writers(tmp_path, SIZES, keep=2)
    for rounds, is_evaluated in ((1, True), (2, False), (2, True)):
        save_round(ranks[::-1], rounds, is_evaluated)
    assert names(tmp_path) == [round_name(2, False), round_name(2)]


def test_a_round_is_saved_again(tmp_path: Path):
    """A resumed run replaces the round checkpoint."""
    for keep in (2, 3):
        save_round(writers(tmp_path, SIZES, keep), 1)
    saved = newest_complete(tmp_path)
    assert saved is not None and saved.errors() == [] and names(tmp_path) == after(1)


def test_half_a_border_goes_when_a_newer_one_is_whole(tmp_path: Path):
    """It stays until then; newer ones may still be in progress."""
    earlier = writers(tmp_path, SIZES)
    save_round(earlier, 1)
    save_round(earlier[:2], 2)
    ranks = writers(tmp_path, SIZES)
    save_round(ranks[1:], 4)
    save_round(ranks[1:], 3)
    assert names(tmp_path) == after(1, 2, 3, 4)
    save_round(ranks[:1], 3)
    assert names(tmp_path) == after(1, 3, 4)


def test_a_border_that_becomes_whole_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Slow ranks finish their parts, and those of the next one, while rank 0 lists the complete ones."""
    ranks, late = writers(tmp_path, SIZES, keep=2), [1, 2]

    def look(path: Path, passed: list[str]) -> SavedState | None:
        found = find_usable(path, passed)
        while late:
            save_round(ranks[1:], late.pop(0))
        return found

    save_round(ranks[:1], 1)
    monkeypatch.setattr(checkpointer, "find_usable", look)
    save_round(ranks[:1], 2)
    assert names(tmp_path) == after(1, 2)


def test_sections_go_with_their_round(tmp_path: Path):
    """This includes those of the best round: only sections after the newest round checkpoint are useful."""
    ranks = writers(tmp_path, SIZES)
    save_round(ranks[::-1], 1)
    for silo in (0, 1):
        save_mid_round_checkpoint(ranks, silo, 1, 10)
    save_round(ranks[1:], 2)
    assert find_saved(tmp_path / mid_round_name(0, 1, 10)) and find_saved(tmp_path / mid_round_name(1, 1, 10))
    save_round(ranks[:1], 2)
    save_mid_round_checkpoint(ranks, 0, 2, 10)
    assert names(tmp_path) == after(1, 2)
    assert not list((tmp_path / round_name(1)).glob("silo-*/"))
    assert find_saved(tmp_path / mid_round_name(0, 2, 10))


def test_the_newest_sections_stay(tmp_path: Path):
    ranks = writers(tmp_path, SIZES)
    steps = range(10, 100, 10)
    for step in steps:
        for silo in (0, 1):
            save_mid_round_checkpoint(ranks, silo, 0, step)
    for silo in (0, 1):
        there = sorted(path.name for path in (tmp_path / mid_round_name(silo, 0, 0)).parent.iterdir())
        assert there == [f"step-{step:06d}" for step in steps[-MID_ROUND_KEPT:]]


def in_order(turns: Sequence[int], ranks: Sequence[Checkpointer]) -> Iterator[tuple[Checkpointer, int, int]]:
    """Draw which replica saves next, which save it is, and how many saves all have finished.

    No replica begins a save before all have finished the last but one, since each has waited for that before the last,
    and all have begun the last one, at a common step or at the end of a round.
    """
    ended = [0] * len(ranks)
    for turn in turns:
        if ended[turn] <= min(ended) + 1:
            ended[turn] += 1
            yield ranks[turn], ended[turn], min(ended)


turns = st.lists(st.integers(0, sum(SIZES) - 1), max_size=30)


@settings(laws, max_examples=40)
@given(turns, st.integers(1, 3), st.sets(st.integers(1, 10)))
def test_in_whatever_order_borders_are_written_the_newest_whole_one_stays(
    tmp_path_factory: pytest.TempPathFactory, turns: list[int], keep: int, best: set[int]
):
    """It is the one that all have finished; earlier ones that are to be kept stay too."""
    folder = tmp_path_factory.mktemp("rounds")
    for one, rounds, whole in in_order(turns, writers(folder, SIZES, keep)):
        save_round([one], rounds, is_best=rounds in best)
        saved = newest_complete(folder)
        assert (saved.folder.name if saved else None) == (round_name(whole) if whole else None)
        assert set(names(folder)) >= set(after(*range(max(1, whole - keep + 1), whole + 1)))
        assert len(names(folder)) <= keep + 1 + 2 + 1  # the best, two in progress, one not yet removed


@settings(laws, max_examples=40)
@given(turns)
def test_in_whatever_order_sections_are_written_the_newest_whole_one_stays(
    tmp_path_factory: pytest.TempPathFactory, turns: list[int]
):
    folder = tmp_path_factory.mktemp("sections")
    for one, number, whole in in_order(turns, writers(folder, (sum(SIZES),))):
        save_mid_round_checkpoint([one], 0, 0, 10 * number)
        start = writers(folder, (1,))[0].latest() if whole else None
        assert start is None or (steps_of(start) == ("", {0: 10 * whole}) and not start.states[0].errors())
        written = list(folder.rglob(f"replica-{one.topology.replica}.safetensors"))
        assert 1 <= len(written) <= MID_ROUND_KEPT


@settings(laws, max_examples=40)
@given(st.sets(st.integers(3, 9), max_size=MID_ROUND_KEPT - 1), st.lists(st.integers(0, 1), max_size=12))
def test_what_an_earlier_start_did_not_finish_displaces_nothing(
    tmp_path_factory: pytest.TempPathFactory, unfinished: set[int], turns: list[int]
):
    """It was killed when only one replica had written later steps; the run resumes from step 10."""
    folder = tmp_path_factory.mktemp("unfinished")
    earlier = writers(folder, (2,))
    save_mid_round_checkpoint(earlier, 0, 0, 10)
    for step in unfinished:
        save_mid_round_checkpoint(earlier[:1], 0, 0, 10 * step)
    for one, number, whole in in_order(turns, writers(folder, (2,))):
        save_mid_round_checkpoint([one], 0, 0, 10 + number)
        start = writers(folder, (2,))[0].latest()
        assert steps_of(start) == ("", {0: 10 + whole})


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(("damaged", "following"), [(6, 5), (5, 6)])
def test_what_is_damaged_displaces_nothing(tmp_path: Path, keep: int, damaged: int, following: int):
    """The run resumes from the previous round checkpoint, and saves the next one before or after that round."""
    for rounds in (4, damaged):
        save_round(writers(tmp_path, SIZES), rounds)
    path = tmp_path / round_name(damaged) / "silo-0.replica-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    ranks = writers(tmp_path, SIZES, keep)
    assert steps_of(ranks[0].latest())[0] == round_name(4)
    for one in ranks:
        assert steps_of(writers(tmp_path, SIZES)[0].latest())[0] == round_name(4)
        save_round([one], following)
    assert steps_of(writers(tmp_path, SIZES)[0].latest())[0] == round_name(following)


def test_a_folder_that_a_peer_has_just_made_stays(tmp_path: Path):
    """The peer has begun its fourth save without a file yet when this replica finishes its third."""
    mine = writers(tmp_path, (2,))[0]
    for step in (10, 20):
        save_mid_round_checkpoint([mine], 0, 0, step)
    (tmp_path / mid_round_name(0, 0, 40)).mkdir()
    save_mid_round_checkpoint([mine], 0, 0, 30)
    assert (tmp_path / mid_round_name(0, 0, 40)).exists()


def test_a_section_that_was_gone_on_from_is_whole_until_there_is_a_newer_one(tmp_path: Path):
    """Preempted again before its first step, a silo saves the same step, and is killed meanwhile."""
    save_mid_round_checkpoint(writers(tmp_path, (2,)), 0, 0, 10)
    again = writers(tmp_path, (2,))
    assert steps_of(again[0].latest()) == ("", {0: 10})
    save_mid_round_checkpoint(again[:1], 0, 0, 10)
    assert steps_of(writers(tmp_path, (2,))[0].latest()) == ("", {0: 10})


def test_a_border_that_was_gone_on_from_is_whole_until_there_is_a_newer_one(tmp_path: Path):
    """Preempted again before its evaluation, a run saves the same round checkpoint, and is killed meanwhile."""
    save_round(writers(tmp_path, SIZES, keep=1), 3, is_evaluated=False)
    again = writers(tmp_path, SIZES, keep=1)
    assert steps_of(again[0].latest())[0] == round_name(3, False)
    save_round(again[:1], 3, is_evaluated=False)
    assert steps_of(writers(tmp_path, SIZES)[0].latest())[0] == round_name(3, False)
