"""Runs that are preempted, hang, make no progress, or find a damaged checkpoint: their messages and how they resume."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.command import Shell, work
from trainer.checkpoint import newest_complete
from trainer.checkpoint.resume import round_folders
from trainer.loggers.jsonl import read_jsonl

MODELS = """
import time
from torch import nn

class Small(nn.Module):
    def __init__(self, seconds=0.03, breaks_at=None):
        super().__init__()
        self.layer, self.drop = nn.Linear(64, 10), nn.Dropout(0.2)
        self.seconds, self.breaks_at, self.calls = seconds, breaks_at, 0

    def forward(self, images):
        self.calls += self.training
        if self.calls == self.breaks_at:
            raise ArithmeticError("the model broke")
        time.sleep(self.seconds * self.training)
        return self.layer(self.drop(images.flatten(1)))
"""
OWN = ("model=custom", "model._target_=own.Small", "round.steps=40")
SECONDS_TO_END = 15


@pytest.fixture(scope="module", autouse=True)
def own_module(shell: Shell) -> None:
    (shell.folder / "own.py").write_text(MODELS)


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    saved = newest_complete(folder / "checkpoints")
    assert saved and not saved.errors()
    return saved.load("model")


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Assert that the weights are the same to the last bit, and each round is logged once, with the same metrics."""
    one, other = model_of(ours), model_of(theirs)
    assert one.keys() == other.keys()

    def equal(left: Any, right: Any) -> bool:
        return all(equal(left[k], right[k]) for k in right) if isinstance(right, dict) else torch.equal(left, right)

    assert equal(one, other)
    assert reported(ours) == reported(theirs)


def reported(folder: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "per_second", "slowest/", "memory/", "system/")
    rounds = read_jsonl(folder / "metrics.jsonl")
    return [
        {name: value for name, value in line.items() if not any(word in name for word in clocks)} for line in rounds
    ]


@pytest.fixture(scope="module")
def alone(ranks, shell: Shell) -> Path:
    """Train an undisturbed run of two silos."""
    overrides = [*OWN, "+model.seconds=0", "algorithm=diloco", "silos=2", "rounds=3", "run_dir=alone"]
    ranks(2).run(work, overrides, str(shell.folder))
    return shell.folder / "alone"


@pytest.mark.long
def test_a_preempted_run_goes_on_at_the_step(shell: Shell, alone: Path) -> None:
    """SIGUSR1 in the middle of a round, then a time limit, then the end: the result is that of the undisturbed run."""
    overrides = (*OWN, "algorithm=diloco", "silos=2", "rounds=3", "run_dir=left")
    started = shell.start_training(*overrides)
    started.wait_for("round 1/3")
    time.sleep(0.3)
    os.kill(started.process.pid, signal.SIGUSR1)
    ended = started.end(within_seconds=SECONDS_TO_END)
    assert ended.code == 75, ended.err
    assert json.loads((shell.folder / "left/state.json").read_text())["status"] == "preempted"
    sections = list((shell.folder / "left/checkpoints/round-000001").glob("silo-*/step-*/replica-0.json"))
    assert len({path.parts[-3] for path in sections}) == 2, "each silo has saved its own"
    limited = shell.train(*overrides, "launch.max_seconds=0.5")
    assert limited.code == 75 and "continues from round 1, silo 0 at step-" in limited.out, limited.out + limited.err
    ended = shell.train(*overrides)
    assert ended.code == 0, ended.err
    assert_same_run(shell.folder / "left", alone)


@pytest.mark.long
def test_one_worker_that_is_told_tells_all_under_torchrun(shell: Shell) -> None:
    """SIGTERM reaches rank 1 alone: both silos save, and the launcher sees workers that exited normally."""
    options = ("--standalone", "--nproc-per-node", "2")
    started = shell.start_torchrun(
        *OWN, "algorithm=fedavg", "silos=2", "rounds=50", "run_dir=preempted", options=options
    )
    started.wait_for("round  1/50")
    os.kill(shell.worker(rank=1), signal.SIGTERM)
    ended = started.end(within_seconds=SECONDS_TO_END)
    assert ended.code == 0, ended.err
    assert json.loads((shell.folder / "preempted/state.json").read_text())["status"] == "preempted"
    assert len(list((shell.folder / "preempted/checkpoints").glob("round-*/silo-*/step-*/replica-0.json"))) >= 2


@pytest.mark.long
def test_a_rank_that_hangs_is_named(shell: Shell) -> None:
    """A rank is stopped while it works: the other names it and its last phase, and the run is restarted."""
    overrides = (*OWN, "rounds=4", "launch.silo_timeout_seconds=6", "launch.max_restarts=1", "run_dir=hangs")
    started = shell.start_training(*overrides)
    started.wait_for("round 1/4")
    time.sleep(0.8)  # longer than a heartbeat, shorter than the round
    os.kill(shell.worker(rank=1), signal.SIGSTOP)
    ended = started.end(within_seconds=60)
    assert "rank 0 waited in vain while round 2: training client 0, step" in ended.err, ended.err
    assert "rank 1 has not been heard from for" in ended.err and "s; round 2: training client 0" in ended.err
    assert "restart 1 of 1" in ended.err
    assert ended.code == 0


@pytest.mark.long
def test_starts_that_come_no_further_are_not_repeated(shell: Shell) -> None:
    """The model fails at the same step each time."""
    ended = shell.train(*OWN, "+model.seconds=0", "+model.breaks_at=5", "rounds=2", "run_dir=loop")
    assert ended.code == 1
    assert ended.err.count("the model broke") >= 1
    assert "3 starts in a row came no further than the beginning" in ended.err, ended.err
    state = json.loads((shell.folder / "loop/state.json").read_text())
    assert state["status"] == "crashed" and state["final"]


@pytest.mark.long
def test_a_damaged_checkpoint_is_passed_over_and_named(ranks, shell: Shell, alone: Path) -> None:
    """The previous one is used, and the result is that of the undisturbed run."""
    overrides = (*OWN, "+model.seconds=0", "algorithm=diloco", "silos=2", "run_dir=damaged")
    ranks(2).run(work, [*overrides, "rounds=2"], str(shell.folder))
    newest = round_folders(shell.folder / "damaged/checkpoints")[-1]
    damaged = newest / "silo-1.replica-0.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    ended = shell.train(*overrides, "rounds=3")
    assert ended.code == 0, ended.err
    assert "skipped:" in ended.err and str(damaged.relative_to(shell.folder)) in ended.err
    assert_same_run(shell.folder / "damaged", alone)


@pytest.mark.long
def test_a_run_begins_from_the_checkpoint_of_another(shell: Shell, alone: Path) -> None:
    """resume=PATH does not change the other run; another configuration is refused with the differences."""
    overrides = (*OWN, "+model.seconds=0", "algorithm=diloco", "silos=2", "rounds=4", "resume=alone")
    before = sorted(path.name for path in alone.rglob("*"))
    ended = shell.train(*overrides, "run_dir=branch")
    assert ended.code == 0 and "continues from round 3" in ended.out, ended.out + ended.err
    assert [line["round"] for line in read_jsonl(shell.folder / "branch/metrics.jsonl")] == [4]
    assert sorted(path.name for path in alone.rglob("*")) == before
    refused = shell.train(*overrides, "run_dir=other", "optimizer.lr=0.5")
    assert refused.code == 2 and "optimizer.lr=0.5" in refused.err
    refused = shell.train(*overrides, "run_dir=other", "resume=nowhere")
    assert refused.code == 2 and "resume=nowhere" in refused.err


@pytest.mark.long
def test_changed_data_is_refused(ranks, shell: Shell) -> None:
    """A text is edited between two starts."""
    text = shell.folder / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 200)
    overrides = (
        "data=text",
        "data.path=text.txt",
        "data.length=16",
        "model.width=16",
        "model.layers=1",
        "model.heads=2",
    )
    ranks(2).run(work, [*overrides, "rounds=1", "run_dir=text"], str(shell.folder))
    text.write_text(text.read_text().replace("question", "questiom", 1))
    refused = shell.train(*overrides, "rounds=2", "run_dir=text")
    assert refused.code == 2 and "data=" in refused.err and "changed" in refused.err, refused.err
