"""Curves within a round: the steps that a run logs, which change nothing else, and go on after a preemption."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.laws.cases import SIZES, Records, assert_same, case_run
from tests.laws.test_midround import LeavesAt
from tests.laws.test_resume import noisy_choices, timeless
from trainer.checkpoint import Checkpointer
from trainer.distributed.topology import distributed
from trainer.loggers import JsonLinesLogger, Metrics, read_jsonl
from trainer.loop import control
from trainer.loop.checkpointing import logged_metrics, logged_steps
from trainer.loop.fit import fit
from trainer.loop.options import MetricsOptions
from trainer.loop.stopping import Preempted

ROUNDS = 3


@dataclass
class Steps(Records):
    """A logger that keeps those of steps too."""

    steps: list[Metrics] = field(default_factory=list)

    def log_step(self, metrics: Metrics) -> None:
        self.steps.append(metrics)


def run(every: int | None, seen: list[float] | None = None, **choices: Any) -> Steps:
    """Run on one rank; `seen` gets the loss of each step, which costs nothing where it is not asked for."""
    records = Steps()
    with distributed(1, device="cpu") as topology:
        made = case_run(topology, "sync", {"rounds": ROUNDS, "metrics": MetricsOptions(every_steps=every)} | choices)
        fit(made, [records], on_step=None if seen is None else lambda done, examples, loss: seen.append(loss()))
    return records


def test_each_logged_step_is_the_one_that_was_made():
    seen: list[float] = []
    records, others = run(3, seen), run(None)
    a_round = -(-sum(SIZES) // 4)
    places = [
        (index, a_round * (index - 1) + step) for index in range(1, ROUNDS + 1) for step in range(3, a_round + 1, 3)
    ]
    assert [(metrics["round"], metrics["step"]) for metrics in records.steps] == places
    assert [metrics["train/loss"] for metrics in records.steps] == [seen[step - 1] for _, step in places]
    assert all(metrics["examples_per_second"] > 0 for metrics in records.steps)
    for one, other in zip(records.rounds, others.rounds, strict=True):
        assert_same(timeless(one), timeless(other))
    assert others.steps == []


def test_without_it_no_loss_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    """The loss of a step waits for the device: it is read once every N steps, and never where none are logged."""
    read = []
    with patch("trainer.algorithms.client_result.ClientResult.last_loss", lambda _: read.append(1) or 0.0):
        run(None)
        assert read == []
        logged = run(5).steps
    assert len(read) == len(logged)


def part(folder: Path, leaves: bool) -> None:
    """Train with a file of metrics, to the end or until preempted."""
    with distributed(1) as topology, patch.object(control, "CONSENSUS_INTERVAL_SECONDS", 0.0):
        choices = noisy_choices("sync") | {"rounds": ROUNDS, "metrics": MetricsOptions(every_steps=1)}
        made = case_run(topology, "sync", choices)
        checkpoints = Checkpointer(folder / "checkpoints", topology, made.assignment_digest)
        start = checkpoints.latest()
        kept = (start.logged_rounds, logged_steps(start)) if start else (0, 0)
        loggers = [JsonLinesLogger(folder / "metrics.jsonl", *kept)] if topology.rank == 0 else []
        if loggers and start:
            assert loggers[0].restore(logged_metrics(start)) == []
        try:
            fit(made, loggers, checkpoints, start, control=LeavesAt(0, 2) if leaves else None)
            assert not leaves
        except Preempted:
            assert leaves


@pytest.mark.parametrize("lost", [0, 1])
def test_a_preempted_run_has_each_step_once(ranks, tmp_path: Path, lost: int):
    """Also those of the steps before a mid-round checkpoint; steps that are made again are logged again."""
    for folder, leaves in ((tmp_path / "left", True), (tmp_path / "alone", False)):
        folder.mkdir()
        ranks(1).run(part, folder, leaves)
    path = tmp_path / "left" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"round": 2, "step": 99, "train/loss": 1.0}\n' * lost)
    ranks(1).run(part, tmp_path / "left", False)
    ours, theirs = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("left", "alone"))
    assert [(one["round"], one.get("step")) for one in ours] == [(one["round"], one.get("step")) for one in theirs]
    assert [one["train/loss"] for one in ours] == [one["train/loss"] for one in theirs]
