"""Damaged checkpoints: each flipped bit is detected before use, and a run resumes from undamaged ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.disk import (
    content,
    flipped,
    mid_round_name,
    round_name,
    save_mid_round_checkpoint,
    save_round,
    steps_of,
    writers,
)
from trainer.checkpoint import ResumePoint
from trainer.checkpoint.format import FORMAT
from trainer.distributed.topology import distributed

laws = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = (2, 1)  # of the silos that save


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """This process is a world of one rank."""
    with distributed():
        yield


def written(folder: Path) -> Path:
    """Two round checkpoints, and after the second two mid-round checkpoints of silo 0 and one of silo 1."""
    with distributed():
        ranks = writers(folder, SIZES)
        save_round(ranks, 1)
        save_round(ranks, 2)
        for silo, step in ((0, 100), (0, 200), (1, 50)):
            save_mid_round_checkpoint(ranks, silo, 2, step)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Checkpoints to damage."""
    return written(tmp_path)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints to damage and to restore."""
    return written(tmp_path_factory.mktemp("saved"))


def newest(folder: Path) -> ResumePoint:
    """Return the resume point of a run with the same silos."""
    start = writers(folder, SIZES)[0].latest()
    assert start is not None
    return start


def test_undamaged_it_goes_on_from_the_newest(saved: Path):
    start = newest(saved)
    assert steps_of(start) == (round_name(2), {0: 200, 1: 50})
    assert start.rejected == () and start.rounds == 2


# By the folder with a damaged file: the round checkpoint and the silos' steps from which the run resumes instead.
INSTEAD = {
    round_name(2): ("", {0: 200, 1: 50}),
    mid_round_name(0, 2, 200): (round_name(2), {0: 100, 1: 50}),
    mid_round_name(1, 2, 50): (round_name(2), {0: 200}),
}
folders = pytest.mark.parametrize("folder", INSTEAD, ids=["round", "mid-round", "only mid-round"])
suffixes = pytest.mark.parametrize("suffix", [".safetensors", ".json"])


def assert_noticed(saved: Path, folder: str, path: Path, damaged: bytes | None) -> None:
    """Assert that a run resumes from undamaged checkpoints, and reports the reason, if the file has this content."""
    with content(path, damaged):
        start = newest(saved)
    assert steps_of(start) == INSTEAD[folder]
    assert len(start.rejected) == 1
    assert str(path) in start.rejected[0]


@folders
@suffixes
@settings(laws, max_examples=30)
@given(data=st.data())
def test_every_flipped_bit_is_noticed(saved_once: Path, folder: str, suffix: str, data: st.DataObject):
    path = data.draw(st.sampled_from(sorted((saved_once / folder).glob(f"*{suffix}"))))
    own = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(own) - 1)), data.draw(st.integers(0, 7))
    assert_noticed(saved_once, folder, path, flipped(own, place, bit))


@folders
@suffixes
@settings(laws, max_examples=15)
@given(data=st.data())
def test_every_truncation_and_every_addition_is_noticed(
    saved_once: Path, folder: str, suffix: str, data: st.DataObject
):
    path = data.draw(st.sampled_from(sorted((saved_once / folder).glob(f"*{suffix}"))))
    own = path.read_bytes()
    assert_noticed(saved_once, folder, path, own[: data.draw(st.integers(0, len(own) - 1))])
    assert_noticed(saved_once, folder, path, own + data.draw(st.binary(min_size=1, max_size=9)))


@folders
def test_missing_tensors_are_noticed(saved_once: Path, folder: str):
    for path in (saved_once / folder).glob("*.safetensors"):
        assert_noticed(saved_once, folder, path, None)


def test_it_resumes_from_the_round_checkpoint_before(saved: Path):
    """The newest round checkpoint and the sections after it are damaged, each in another rank's part."""
    damaged = [saved / round_name(2) / "silo-1.replica-0.safetensors"]
    damaged += [saved / mid_round_name(0, 2, step) / "replica-1.safetensors" for step in (100, 200)]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1])
    start = newest(saved)
    assert steps_of(start) == (round_name(1), {}) and start.rounds == 1
    assert all(any(str(path) in fault for fault in start.rejected) for path in damaged)


def test_when_nothing_is_left_all_faults_are_said(tmp_path: Path):
    """The error names each damaged file, and a remedy."""
    for rounds in (1, 2):
        save_round(writers(tmp_path, SIZES), rounds)
    damaged = sorted(tmp_path.rglob("*.safetensors"))
    assert len(damaged) == 2 * sum(SIZES)
    for path in damaged:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)can be used.*run_dir") as raised:
        newest(tmp_path)
    assert all(str(path) in str(raised.value) for path in damaged)


def test_another_version_is_not_gone_on_from(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """Each file of a later version says so."""
    monkeypatch.setattr("trainer.checkpoint.format.FORMAT", 1)
    with pytest.raises(ValueError, match=rf"format {FORMAT}; this version reads 1"):
        newest(saved)


def test_a_run_that_was_killed_in_its_first_save_starts_anew(tmp_path: Path):
    """Nothing is damaged, but a part is missing: the same command starts again, and overwrites it."""
    ranks = writers(tmp_path, SIZES)
    save_round(ranks[:1], 1)
    assert writers(tmp_path, SIZES)[0].latest() is None
    save_round(writers(tmp_path, SIZES), 1)
    assert steps_of(newest(tmp_path)) == (round_name(1), {})


def test_silos_that_were_killed_before_the_first_checkpoint_start_anew(tmp_path: Path):
    """Silo 0 has saved inside the first round, silo 1 has not."""
    save_mid_round_checkpoint(writers(tmp_path, SIZES), 0, 0, 100)
    assert writers(tmp_path, SIZES)[0].latest() is None


@pytest.mark.parametrize("character", ["\n", "\x85", "\u2028", " is not whole", "%", "{", "\udcff", "'", "\\"])
def test_damage_is_passed_over_whatever_characters_the_path_has(tmp_path: Path, character: str) -> None:
    """The path is in the sentences by which damaged states are known."""
    folder = tmp_path / f"a{character}b"
    with distributed():
        ranks = writers(folder)
        save_round(ranks, 1)
        save_round(ranks, 2)
        damaged = folder / round_name(2) / "silo-0.replica-0.safetensors"
        damaged.write_bytes(flipped(damaged.read_bytes(), 100, 3))
        start = ranks[0].latest()
    assert steps_of(start) == (round_name(1), {})
    assert start and [str(damaged) in reason for reason in start.rejected] == [True]
