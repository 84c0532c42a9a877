"""Asynchronous saves: they contain the state at the call, one waits for the other, and errors are raised."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch

from tests.support.disk import assert_trees_equal, mid_round_name, round_name, save_round, steps_of, writers
from trainer.checkpoint import Checkpointer, ResumePoint, checkpointer, newest_complete
from trainer.checkpoint.format import find_saved, write_shard
from trainer.distributed.topology import distributed

SECONDS = 0.1


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """This process is a world of one rank."""
    with distributed():
        yield


class Disk:
    """A slow disk that writes after `let`, and logs the begin and end of each write."""

    def __init__(self):
        self.let, self.log = Event(), []

    def write(self, folder: Path, *rest: Any) -> None:
        self.log.append(f"begins {folder.name}")
        assert self.let.wait(60)
        write_shard(folder, *rest)
        self.log.append(f"ends {folder.name}")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(checkpointer, "write_shard", disk.write)
    yield disk
    disk.let.set()


Save = Callable[[Checkpointer, int, dict[str, Any]], None]


def save_a_round(mine: Checkpointer, rounds: int, tree: dict[str, Any]) -> None:
    mine.save_round(round_name(rounds), tree, {}, {}, {}, {"own": {"own": tree}}, all_ranks_write=True)


def save_a_mid_round(mine: Checkpointer, step: int, tree: dict[str, Any]) -> None:
    mine.save_mid_round(1, step, tree, {}, {"own": tree})


@pytest.mark.parametrize(("save", "name"), [(save_a_round, round_name(7)), (save_a_mid_round, mid_round_name(0, 1, 7))])
def test_what_is_saved_is_what_was_there_at_the_call(tmp_path: Path, slow: Disk, save: Save, name: str):
    """Training continues in the same tensors, views and parameters among them, while a thread writes."""
    vector, parameter = torch.arange(10.0), torch.nn.Parameter(torch.ones(3))
    tree = {"model": {"head": vector[:4], "turned": vector.view(2, 5).T, "same": vector[:4], "weight": parameter}}
    expected = {name: leaf.detach().clone() for name, leaf in tree["model"].items()}
    (mine,) = writers(tmp_path)
    save(mine, 7, tree)
    with torch.no_grad():
        vector.fill_(-1)
        parameter.fill_(-1)
    tree["model"].clear()
    slow.let.set()
    mine.wait()
    saved = find_saved(tmp_path / name)
    assert saved is not None
    (shard,) = saved.shards
    for loaded in (saved.load("model"), saved.load_shard(shard, "own")["own"]["model"]):
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_each_save_is_of_its_own_time(tmp_path: Path):
    """All are copied into the same memory; tensors may change shape and type, appear and disappear."""
    (mine,) = writers(tmp_path, keep=5)
    trees = [
        {"weight": torch.full((3,), 1.0), "old": torch.ones(2)},
        {"weight": torch.full((3,), 2.0)},
        {"weight": torch.full((4, 2), 3.0), "new": torch.ones(2)},
        {"weight": torch.full((4, 2), 4), "old": torch.zeros(2)},
    ]
    for rounds, tree in enumerate(trees):
        save_a_round(mine, rounds, {"model": tree})
    mine.wait()
    for rounds, tree in enumerate(trees):
        saved = find_saved(tmp_path / round_name(rounds))
        assert saved is not None and saved.errors() == []
        assert_trees_equal(saved.load("model"), tree)


@pytest.mark.parametrize(("first", "second"), [(save_a_round, save_a_mid_round), (save_a_mid_round, save_a_round)])
def test_the_second_save_waits_for_the_first(tmp_path: Path, slow: Disk, first: Save, second: Save):
    """The first save does not wait for the disk; the waiting time of the second is reported once."""
    (mine,) = writers(tmp_path)
    first(mine, 1, {"a": {"b": 1}})
    assert len(slow.log) <= 1
    mine.take_stall_seconds()
    Timer(SECONDS, slow.let.set).start()
    second(mine, 2, {"a": {"b": 1}})
    assert mine.take_stall_seconds() > 0.5 * SECONDS
    assert mine.take_stall_seconds() == 0
    mine.wait()
    assert [line.split()[0] for line in slow.log] == ["begins", "ends"] * 2


def test_who_has_nothing_to_bring_waits_for_its_own_save(tmp_path: Path, slow: Disk):
    """Silo 1's section is on the disk before silo 0 alone writes the next round checkpoint."""
    mine = writers(tmp_path, (1, 1))[1]
    save_a_mid_round(mine, 5, {})
    Timer(SECONDS, slow.let.set).start()
    mine.save_round(round_name(2), {}, {}, {}, {}, {}, all_ranks_write=False)
    assert slow.log == ["begins step-000005", "ends step-000005"]
    assert not (tmp_path / round_name(2)).exists()


def test_what_went_wrong_is_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The error is raised by the next save or by `wait`, after which saving works again."""
    (mine,) = writers(tmp_path)

    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, "the disk is on fire")

    with monkeypatch.context() as broken:
        broken.setattr(checkpointer, "write_shard", fail)
        save_a_round(mine, 1, {})
        with pytest.raises(OSError, match="fire"):
            save_a_round(mine, 2, {})
        save_a_round(mine, 3, {})
        with pytest.raises(OSError, match="fire"):
            mine.wait()
        mine.wait()
    save_a_round(mine, 4, {})
    mine.wait()
    saved = newest_complete(tmp_path)
    assert saved is not None and saved.folder.name == round_name(4)


def put_a_folder_in_the_way(folder: Path) -> dict[str, Any]:
    (folder / round_name(1) / ".silo-0.replica-0.partial").mkdir(parents=True)
    return {"a": torch.ones(1)}


def choose_a_type_without_a_format(folder: Path) -> dict[str, Any]:
    return {"a": torch.ones(1, dtype=torch.complex128)}


@pytest.mark.parametrize("prepare", [put_a_folder_in_the_way, choose_a_type_without_a_format])
def test_whatever_goes_wrong_in_the_thread_is_raised(tmp_path: Path, prepare: Callable[[Path], dict[str, Any]]):
    """A run that cannot save must not continue silently, whether the disk fails or our code."""
    (mine,) = writers(tmp_path)
    save_a_round(mine, 1, {"model": prepare(tmp_path)})
    with pytest.raises(Exception):  # noqa: B017, PT011 (of either type)
        mine.wait()


def test_a_section_that_nobody_needs_any_more_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rank 0 removes the sections of a round after the next round checkpoint, even while one is written."""
    ranks = writers(tmp_path, (1, 1))

    def lose(*arguments: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "the folder is gone")

    save_round(ranks, 1)
    with monkeypatch.context() as dropped:
        dropped.setattr(checkpointer, "write_shard", lose)
        save_a_mid_round(ranks[1], 5, {})
        with pytest.raises(OSError, match="gone"):
            ranks[1].wait()
    save_round(ranks, 2)
    with monkeypatch.context() as dropped:
        dropped.setattr(checkpointer, "write_shard", lose)
        save_a_mid_round(ranks[1], 6, {})
        ranks[1].wait()


LARGE = {"model": {"weight": torch.zeros(1 << 18)}}  # a megabyte


def newest(folder: Path) -> ResumePoint:
    start = writers(folder)[0].latest()
    assert start is not None
    return start


@pytest.mark.parametrize("save", [save_a_round, save_a_mid_round])
def test_a_full_disk(mounted: Callable[[str], Path], save: Save):
    """The error has the folder and the free bytes; the previous checkpoint stays; with space, saving works again."""
    folder = mounted("size=3m") / "checkpoints"
    (mine,) = writers(folder)
    save_round([mine], 1)
    other = folder.parent / "other"
    other.write_bytes(bytes(1 << 21))
    before = steps_of(newest(folder))
    save(mine, 2, LARGE)
    with pytest.raises(OSError, match=r"is full \(.* bytes are free\)") as raised:
        mine.wait()
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    assert raised.value.errno == errno.ENOSPC
    assert str(folder) in str(raised.value) and f"{free:,} bytes" in str(raised.value)
    assert steps_of(newest(folder)) == before == (round_name(1), {})
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    other.unlink()
    save(mine, 2, LARGE)
    mine.wait()
    after = newest(folder)
    assert steps_of(after) != before and all(not saved.errors() for saved in after.states)
    assert not after.rejected


def test_a_quota_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Clusters have quotas, so free space may not be available."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    (mine,) = writers(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse)
    save_a_round(mine, 1, {})
    with pytest.raises(OSError, match=rf"(?s){tmp_path}.*make room") as raised:
        mine.wait()
    assert raised.value.strerror and str(tmp_path) in raised.value.strerror


@pytest.mark.parametrize("left", range(3))
def test_a_disk_without_room_for_another_file(mounted: Callable[[str], Path], left: int):
    """There is no inode for the folder, for the tensors or for the JSON file: the error is the same."""
    folder = mounted("size=2m,nr_inodes=20") / "checkpoints"
    (mine,) = writers(folder)
    save_round([mine], 1)
    others = []
    while os.statvfs(folder).f_ffree > left:
        others.append(folder.parent / f"other-{len(others)}")
        others[-1].touch()
    save_a_round(mine, 2, {"model": {"weight": torch.zeros(3)}})
    with pytest.raises(OSError, match=rf"{folder}.*bytes are free"):
        mine.wait()
    assert steps_of(newest(folder)) == (round_name(1), {})
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    for path in others:
        path.unlink()
    save_a_round(mine, 2, {"model": {"weight": torch.zeros(3)}})
    mine.wait()
    assert steps_of(newest(folder)) == (round_name(2), {})
