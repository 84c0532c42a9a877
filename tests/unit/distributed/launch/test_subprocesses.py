"""A machine divided among concurrent jobs, and a preempted process."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.distributed.launch import subprocesses
from trainer.distributed.launch.signals import Terminated, raise_on_stop_signal, reraise_signal
from trainer.distributed.launch.subprocesses import Command, CommandBusyError, ResourceSlot, command_output

MODULE = """
import json, os, sys
print(json.dumps([sorted(os.sched_getaffinity(0)), os.environ.get("CUDA_VISIBLE_DEVICES"), sys.argv[1:]]), flush=True)
sys.stdin.read()
"""


@given(st.lists(st.integers(), max_size=20), st.integers(1, 12))
def test_the_parts_of_a_list_are_disjoint_and_all_of_it(items: list[int], parts: int) -> None:
    slices = [list(subprocesses.slice_items(items, index, parts)) for index in range(parts)]
    assert [*chain(*slices)] == items
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


@pytest.mark.parametrize("jobs", [1, 2, 3, 64])
def test_every_job_has_cores_and_together_they_have_all(jobs: int) -> None:
    shares = subprocesses.resource_slots(jobs)
    cores = os.sched_getaffinity(0)
    assert len(shares) == jobs and all(share.cores for share in shares)
    assert frozenset.union(*(share.cores for share in shares)) == cores
    if jobs <= len(cores):
        assert sum(len(share.cores) for share in shares) == len(cores)


def test_gpus_are_divided_by_the_names_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,GPU-a")
    monkeypatch.setattr(subprocesses, "count_gpus", lambda: 4)
    assert [share.gpus for share in subprocesses.resource_slots(3)] == ["3", "5", "6,GPU-a"]
    assert [share.gpus for share in subprocesses.resource_slots(1)] == [None]
    assert {share.gpus for share in subprocesses.resource_slots(5)} == {None}


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a command that prints its resources, in place of the trainer."""
    (tmp_path / "trainer.py").write_text(MODULE)
    monkeypatch.setattr(subprocesses, "TRAINER", (str(tmp_path / "trainer.py"),))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def end(command: Command) -> int:
    while (code := command.exit_code()) is None:
        time.sleep(0.01)
    return code


def test_a_command_runs_on_its_share(trainer: Path) -> None:
    core = min(os.sched_getaffinity(0))
    assert end(Command(["a=b c"], trainer / "logs/job.log", ResourceSlot(frozenset({core}), "7"))) == 0
    head, reported = (trainer / "logs/job.log").read_text().splitlines()
    assert head == f"{subprocesses.PROMPT} 'a=b c'"
    assert json.loads(reported) == [[core], "7", ["a=b c"]]


def test_a_command_is_run_by_one_process_at_a_time(trainer: Path) -> None:
    """The lock is held by the started command, and released when it ends."""
    (trainer / "trainer.py").write_text("import time; time.sleep(60)")
    log, share = trainer / "job.log", ResourceSlot(frozenset(os.sched_getaffinity(0)))
    first = Command([], log, share)
    with pytest.raises(CommandBusyError):
        Command([], log, share)
    first.terminate()
    assert end(first) == -signal.SIGTERM
    (trainer / "trainer.py").write_text("")
    assert end(Command([], log, share)) == 0


def test_control_c_stays_control_c() -> None:
    # A shell may ignore signals in background processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        reraise_signal(signal.SIGINT)


def test_a_process_that_was_told_to_leave_ends_as_a_preempted_run() -> None:
    with pytest.raises(Terminated) as caught:
        reraise_signal(signal.SIGTERM)
    assert caught.value.code == 75
    with pytest.raises(Terminated), raise_on_stop_signal():
        signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_the_handler_of_a_batch_system_has_its_turn() -> None:
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(Terminated):
            reraise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]


def test_what_cannot_be_asked_has_no_answer() -> None:
    assert command_output("no-such-program") is None
    assert command_output(sys.executable, "-c", "exit(1)") is None
    assert command_output(sys.executable, "-c", "print(1)") == "1\n"
