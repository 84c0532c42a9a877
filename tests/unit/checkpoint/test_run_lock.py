"""One process owns a run folder: on this machine by a lock of the kernel, between machines by heartbeats."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tests.support.disk import other_owner
from trainer.checkpoint import run_lock
from trainer.checkpoint.run_lock import Owner, RunLock

SECONDS_TO_START = 10
AWAY = Owner("node7", 1234, "another kernel", 0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(run_lock, "HEARTBEAT_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "POLL_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.05)


def leave_behind(folder: Path, owner: Owner = AWAY) -> Path:
    """Write the lock that this owner has left, or still has."""
    path = folder / "lock.json"
    path.write_text(json.dumps(asdict(owner)))
    return path


def test_a_second_owner_is_refused_with_the_first(tmp_path: Path) -> None:
    with other_owner(tmp_path) as process:
        with pytest.raises(ValueError, match=rf"run_dir={tmp_path} is in use by process {process.pid} on ") as raised:
            RunLock(tmp_path).acquire()
        assert "another run_dir" in str(raised.value)
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == process.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_folder_of_a_process_that_was_killed_is_free_at_once(tmp_path: Path, number: int) -> None:
    with other_owner(tmp_path) as process:
        assert process.pid
        os.kill(process.pid, number)
        process.join()
        lock = RunLock(tmp_path)
        lock.acquire()
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
        lock.release()


def test_a_stopped_owner_is_an_owner(tmp_path: Path) -> None:
    """It sends no heartbeats, but on the same machine the kernel knows it."""
    with other_owner(tmp_path) as process:
        assert process.pid
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.6)
        with pytest.raises(ValueError, match="is in use"):
            RunLock(tmp_path).acquire()


def test_a_released_folder_holds_no_lock_and_can_be_owned_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    for _ in range(3):
        lock.acquire()
        assert (tmp_path / "lock.json").stat().st_mode & 0o777 == 0o600
        lock.release()
        lock.release()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("owners", [2, 4])
def test_of_several_that_come_together_one_owns_the_folder(tmp_path: Path, owners: int) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def try_it() -> None:
        try:
            RunLock(tmp_path).acquire()
        except ValueError:
            results.put(False)
            return
        results.put(True)
        time.sleep(60)

    processes = [context.Process(target=try_it) for _ in range(owners)]
    for process in processes:
        process.start()
    try:
        assert sorted(results.get(timeout=SECONDS_TO_START) for _ in processes) == [False] * (owners - 1) + [True]
    finally:
        for process in processes:
            process.kill()
            process.join()


def refuse_locks(*arguments: Any) -> None:
    raise OSError(os.strerror(95))


def refuse_as_if_held(*arguments: Any) -> None:
    raise BlockingIOError(11, os.strerror(11))


FILE_SERVERS = [fcntl.lockf, refuse_locks, refuse_as_if_held]


@pytest.mark.parametrize("lockf", FILE_SERVERS)
def test_an_owner_on_another_machine_is_known_by_its_heartbeat(
    tmp_path: Path, lockf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its file server has locks of the other machine, only those of this one, or none."""
    path, ended = leave_behind(tmp_path), Event()

    def beat() -> None:
        while not ended.wait(0.1):
            os.utime(path)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    thread = Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match="in use by process 1234 on node7"):
            RunLock(tmp_path).acquire()
    finally:
        ended.set()
        thread.join()
    assert json.loads(path.read_text())["host"] == "node7"


@pytest.mark.parametrize("lockf", FILE_SERVERS[:2])
def test_the_folder_of_a_silent_machine_is_taken_over(
    tmp_path: Path, lockf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = leave_behind(tmp_path), RunLock(tmp_path)
    monkeypatch.setattr(fcntl, "lockf", lockf)
    began = time.monotonic()
    lock.acquire()
    assert time.monotonic() - began > 0.4, "it has beaten a moment ago"
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_lock_that_a_file_server_keeps_for_a_dead_machine_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lockf = leave_behind(tmp_path), fcntl.lockf
    os.link(path, tmp_path / "held")  # so that its number is not used again
    held = path.stat().st_ino

    def lock_of_server(descriptor: int, operation: int) -> None:
        if os.fstat(descriptor).st_ino == held:
            refuse_as_if_held()
        lockf(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", lock_of_server)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_machine_that_was_silent_for_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is queued again some minutes later begins without a single poll of the file."""
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0)
    naps: list[float] = []
    monkeypatch.setattr(run_lock.time, "sleep", naps.append)
    path, lock = leave_behind(tmp_path), RunLock(tmp_path)
    os.utime(path, (time.time() - 100, time.time() - 100))
    lock.acquire()
    assert not any(naps)
    lock.release()


def test_a_half_written_lock_is_of_nobody(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text('{"host": "no')
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_process_whose_folder_was_taken_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It was suspended so long that another machine has taken it to be dead."""
    with other_owner(tmp_path) as process:
        leave_behind(tmp_path)
        process.join(SECONDS_TO_START)
        assert process.exitcode == 1
    assert f"run_dir={tmp_path} was taken by another run" in capfd.readouterr().err
