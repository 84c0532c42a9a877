"""A worker that fails, is killed or is preempted: reported once, ended within seconds, no process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.command import DEADLINE_SECONDS, Shell
from trainer.loggers import read_jsonl

MODELS = """
import os
import time
from contextlib import suppress
import torch
import torch.distributed as dist
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, images):
        return self.layer(images.flatten(1))

class Breaks(Small):
    calls = 0

    def __init__(self, ranks):
        super().__init__()
        self.ranks = ranks

    def forward(self, images):
        self.calls += self.training
        if dist.get_rank() in self.ranks and self.calls == 30:
            raise ArithmeticError("the model broke")
        return super().forward(images)

class Wide(Small):
    def forward(self, images):
        if self.training and len(images) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has ...")
        return super().forward(images)

class Early(Small):
    def forward(self, images):
        if self.training and len(images) > 2:
            raise ArithmeticError("the first batch broke it")
        return super().forward(images)

class Fills(Small):
    calls = 0

    def forward(self, images):
        self.calls += self.training
        if dist.get_rank() == 0 and self.calls == 30 and os.path.exists("disk/full"):
            with open("disk/other", "wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
        return super().forward(images)

class Slow(Small):
    def forward(self, images):
        time.sleep(0.02 * self.training)
        return super().forward(images)
"""
BREAKS = ("model=custom", "model._target_=own.Breaks")
FILLS = ("model=custom", "model._target_=own.Fills")
SLOW = ("model=custom", "model._target_=own.Slow", "rounds=200")
ENDLESS = (*SLOW[:2], "rounds=2000")
WIDE = ("model=custom", "model._target_=own.Wide", "rounds=1", "round.steps=2", "run_dir=wide")
ONCE = ("launch.max_restarts=0",)
SECONDS_TO_END = 10


@pytest.fixture(scope="module", autouse=True)
def own_module(shell: Shell) -> None:
    (shell.folder / "own.py").write_text(MODELS)


def state_of(folder: Path) -> dict[str, str | int]:
    return json.loads((folder / "state.json").read_text())


def test_a_rank_that_fails_shows_its_traceback_once(shell: Shell) -> None:
    """Its peer, which waits for it in a collective, prints nothing."""
    started = shell.start_training(*BREAKS, "+model.ranks=[1]", "round.steps=20", *ONCE, "run_dir=broken")
    started.wait_for("round  1/20")
    ended = started.end(within_seconds=SECONDS_TO_END)
    assert ended.code == 1
    assert ended.err.count("Traceback") == 1 and ended.err.count("ArithmeticError: the model broke") == 1
    assert ended.err.startswith("rank 1 failed:") and "rank 0" not in ended.err
    assert ended.err.rstrip().endswith("the model broke"), "the cause is printed last"
    folder = shell.folder / "broken"
    assert state_of(folder) == {"status": "crashed", "rank": 1, "error": "ArithmeticError: the model broke"}
    assert "the model broke" in (folder / "logs/rank-1.log").read_text()
    assert not (folder / "result.json").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.long
def test_a_fault_of_the_users_code_before_the_first_step_is_bad_input(shell: Shell) -> None:
    """It names the file and the line, and nothing is restarted. The dry pass does not find it."""
    ended = shell.train("model=custom", "model._target_=own.Early", "run_dir=early")
    assert ended.code == 2, ended.err
    assert ended.err.count("ArithmeticError: the first batch broke it\n  in own.py, line") == 1, ended.err
    assert "Traceback" not in ended.err and "restart" not in ended.err
    state = state_of(shell.folder / "early")
    assert state["status"] == "bad_input" and "(own.py, line" in str(state["error"])


@pytest.mark.long
def test_ranks_that_fail_together_show_one_traceback(shell: Shell) -> None:
    """Two ranks, each alone in its silo, fail in the same step; the other traceback is in the log of its rank."""
    ended = shell.train(*BREAKS, "+model.ranks=[0,1]", "algorithm=fedavg", "silos=2", *ONCE, "run_dir=both")
    assert ended.code == 1
    assert ended.err.count("Traceback") == 1 and "During handling" not in ended.err, ended.err
    assert state_of(shell.folder / "both")["status"] == "crashed"


@pytest.mark.long
def test_a_rank_that_is_killed_is_named(shell: Shell) -> None:
    started = shell.start_training(*SLOW, *ONCE, "run_dir=killed")
    started.wait_for("round   1/200")
    os.kill(shell.worker(rank=1), signal.SIGKILL)
    ended = started.end(within_seconds=SECONDS_TO_END)
    assert ended.code == 1
    assert ended.err.splitlines()[-1] == "rank 1 was killed by SIGKILL; continue with run_dir=killed"
    assert ended.err.count("rank 1") == 1 and "Traceback" not in ended.err
    state = state_of(shell.folder / "killed")
    assert state["status"] == "crashed" and state["rank"] == 1 and "SIGKILL" in str(state["error"])


@pytest.mark.long
def test_control_c_ends_a_run_that_can_continue_later(shell: Shell) -> None:
    """There is no traceback, and the output says how to continue."""
    started = shell.start_training(*SLOW, "run_dir=stopped")
    started.wait_for("round   2/200")  # then the first round is saved
    started.press_control_c()
    ended = started.end(within_seconds=SECONDS_TO_END)
    assert ended.code == 75
    notice = "SIGINT: the workers save and stop; a second signal ends them at once"
    assert ended.err.splitlines() == [notice, "preempted; continue with run_dir=stopped"]
    assert state_of(shell.folder / "stopped")["status"] == "preempted"
    assert any((shell.folder / "stopped/checkpoints").glob("round-*"))


@pytest.mark.parametrize("seconds", [1.0, pytest.param(3.0, marks=pytest.mark.long)])
def test_control_c_while_workers_start_is_quiet(seconds: float, shell: Shell) -> None:
    """Control-C arrives while the launcher imports, or while the workers do."""
    started = shell.start_training("rounds=200", f"run_dir=early-{seconds}")
    time.sleep(seconds)
    started.press_control_c()
    ended = started.end(within_seconds=SECONDS_TO_END)
    assert ended.code in (75, 128 + signal.SIGINT, -signal.SIGINT)  # the last before Python has started
    assert "Traceback" not in ended.err and len(ended.err.splitlines()) <= 2, ended.err


@pytest.mark.long
def test_a_full_disk_is_named_in_a_sentence_and_the_run_continues_with_room(shell: Shell) -> None:
    """It is not restarted. Each round is logged once."""
    disk, overrides = shell.folder / "disk", (*FILLS, "rounds=3", "round.steps=20", "run_dir=disk/run")
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount is not permitted")
    try:
        (disk / "full").touch()
        ended = shell.train(*overrides)
        assert ended.code == 1 and len(ended.err.splitlines()) == 2, ended.err
        assert ended.err.startswith("rank 0: the disk of disk/run/") and "is full (0 bytes are free)" in ended.err
        assert "make room" in ended.err and "resume with the same run_dir" in ended.err
        assert state_of(disk / "run")["status"] == "crashed"
        (disk / "full").unlink()
        (disk / "other").unlink()
        assert shell.train(*overrides).code == 0
        assert [line["round"] for line in read_jsonl(disk / "run/metrics.jsonl")] == [1, 2, 3]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.long
def test_a_second_launch_in_the_folder_of_a_running_one_is_refused(shell: Shell) -> None:
    started = shell.start_training(*ENDLESS, "run_dir=shared")
    started.wait_for("round    1/2000")
    second = shell.start_training(*ENDLESS, "run_dir=shared")
    assert second.process.wait(DEADLINE_SECONDS) == 2
    assert "run_dir=shared is in use by process" in second.err.read_text()
    assert state_of(shell.folder / "shared")["status"] == "running"
    started.press_control_c()
    assert started.end(within_seconds=SECONDS_TO_END).code == 75


@pytest.mark.long
def test_out_of_memory_names_the_key_to_change_and_the_run_continues_in_its_folder(shell: Shell) -> None:
    """It is bad input, not a crash, so nothing is restarted. A step of 32 examples has 16 a rank, of which 9 fit."""
    ended = shell.train(*WIDE)
    assert ended.code == 2 and ended.err.count("micro_batch_size=null: 16 examples at once do not fit in memory") == 1
    assert "could not allocate 1.50 GiB" in ended.err and "set micro_batch_size=8 or less" in ended.err
    assert "Traceback" not in ended.err and "restart" not in ended.err
    folder = shell.folder / "wide"
    assert state_of(folder)["status"] == "bad_input"
    assert shell.train(*WIDE, "micro_batch_size=auto").code == 0
    assert json.loads((folder / "result.json").read_text())["micro_batch_size"] == 8
