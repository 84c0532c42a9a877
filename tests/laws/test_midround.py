"""A run that is preempted at any step, each silo at another one, ends with the bits of an undisturbed run."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.laws.cases import CASES, Records, assert_close, assert_same, case_run, leaves, silos_of
from tests.laws.test_resume import (
    ROUNDS,
    noisy_choices,
    other_algorithms_choices,
    round_checkpoint,
    text_choices,
    timeless,
)
from trainer.checkpoint import Checkpointer, ResumePoint
from trainer.data.client_sampling.sampling import UniformSampler
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import Topology, distributed
from trainer.loop import control
from trainer.loop.control import Action, LoopControl
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions
from trainer.loop.stopping import Preempted

ROUND = 1  # the round of the preemption


class LeavesAt(LoopControl):
    """Requests a stop in round ROUND after a number of steps of the client at `position`."""

    def __init__(self, position: int, steps: int):
        super().__init__()
        self.position, self.steps, self.clients = position, steps, []

    def set_activity(self, phase: str, work: Any = None) -> None:
        super().set_activity(phase, work)
        if work and phase.startswith(f"round {ROUND + 1}:"):
            self.clients.append(work.client)

    def requested_action(self) -> Action:
        if self.result and len(self.clients) == self.position + 1 and self.result.steps >= self.steps:
            self.request_stop()
        return super().requested_action()


class LeavesWhile(LoopControl):
    """Requests a stop as soon as this phase begins."""

    def __init__(self, doing: str):
        super().__init__()
        self.doing = doing

    def requested_action(self) -> Action:
        if self.doing in self.phase:
            self.request_stop()
        return super().requested_action()


Orders = dict[int, tuple[int, int] | str]  # by silo: the moment of the preemption


def contact_of(topology: Topology, orders: Orders) -> LoopControl:
    order = orders.get(topology.silo)
    if order is None:
        return LoopControl()
    return LeavesWhile(order) if isinstance(order, str) else LeavesAt(*order)


def run_part(
    name: str, silos: SiloSpec, choices: dict[str, Any], folder: Path, orders: Orders | None
) -> Records | None:
    """Train from the newest checkpoint to the end, or until preempted."""
    with distributed(silos_of(name, silos)) as topology, patch.object(control, "CONSENSUS_INTERVAL_SECONDS", 0.0):
        run = case_run(topology, name, {"rounds": ROUNDS, "checkpoint.every_rounds": 1} | choices)
        checkpoints = Checkpointer(folder, topology, run.assignment_digest)
        start, records = checkpoints.latest(), Records()
        try:
            fit(run, [records], checkpoints, start, control=contact_of(topology, orders or {}))
        except Preempted:
            return None
        assert not orders, "the run has not been asked to leave"
        return records


def assert_left_and_bit_equal(
    pool, name: str, silos: SiloSpec, choices: dict[str, Any], folder: Path, *orders: Orders
) -> None:
    for order in orders:
        assert pool.run(run_part, name, silos, choices, folder / "left", order)[0] is None
    resumed = pool.run(run_part, name, silos, choices, folder / "left", None)[0]
    alone = pool.run(run_part, name, silos, choices, folder / "alone", None)[0]
    ours, theirs = round_checkpoint(folder / "left", ROUNDS), round_checkpoint(folder / "alone", ROUNDS)
    for section in ("model", "ema", "algorithm", "clients", "residuals"):
        assert_same(leaves(ours.load(section)), leaves(theirs.load(section)))
    for one, other in zip(resumed.rounds[::-1], alone.rounds[::-1], strict=False):
        assert_same(timeless(one), timeless(other))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_rows(5)
def test_silos_leave_at_their_own_steps(ranks, name: str, tmp_path: Path):
    """Silo 0 stops in the middle of a client, silo 1 at the end of the round."""
    choices = noisy_choices(name)
    steps = choices["round"].steps
    assert_left_and_bit_equal(ranks(2), name, 2, choices, tmp_path, {0: (0, max(1, steps - 1))})


@pytest.mark.parametrize("name", ["fedavg_adam", "diloco"])
@pytest.mark.quick_rows(1)
def test_it_may_happen_again_in_the_same_round(ranks, name: str, tmp_path: Path):
    """After 1 step, after 2 while the other silo waits, at the second client, and during the combination."""
    orders: list[Orders] = [{0: (0, 1), 1: (1, 1)}, {0: (0, 2)}, {0: (1, 1)}, {1: "combining"}]
    assert_left_and_bit_equal(ranks(2), name, 2, noisy_choices(name), tmp_path, *orders)


@pytest.mark.parametrize("doing", ["combining", "evaluating"])
@pytest.mark.parametrize("name", ["sync", "diloco"])
def test_told_between_the_steps(ranks, name: str, doing: str, tmp_path: Path):
    """The run is preempted before the combination, or between combination and evaluation."""
    assert_left_and_bit_equal(ranks(2), name, 2, noisy_choices(name), tmp_path, {0: doing})


def test_round_checkpoints_are_not_needed(ranks, tmp_path: Path):
    """With a round checkpoint every third round, only the mid-round checkpoints of the second round exist."""
    choices = noisy_choices("diloco") | {"checkpoint.every_rounds": 3}
    assert_left_and_bit_equal(ranks(2), "diloco", 2, choices, tmp_path, {0: (0, 1)})


@pytest.mark.parametrize("name", ["sync", "diloco"])
@pytest.mark.quick_rows(1)
def test_replicas_leave_on_the_same_step(ranks, name: str, tmp_path: Path):
    """Of four ranks one replica is preempted; all of its silo save at the same step. Their batch statistics differ."""
    choices = noisy_choices(name) | {"round": RoundOptions(steps=9)}
    assert_left_and_bit_equal(ranks(4), name, [2, 2], choices, tmp_path, {0: (0, 2)})


def test_personal_tensors(ranks, tmp_path: Path):
    assert_left_and_bit_equal(ranks(2), "fedavg", 2, other_algorithms_choices(), tmp_path, {1: (0, 2)})


@pytest.mark.parametrize("name", sorted(set(CASES) - {"sync"}))
@pytest.mark.quick_rows(4)
def test_a_silo_may_begin_a_round_in_whose_middle_another_resumes(ranks, name: str, tmp_path: Path):
    """A kill after silo 1 has saved, and before silo 0 has."""
    assert_killed_and_bit_equal(ranks(2), name, noisy_choices(name), tmp_path)


def test_a_silo_may_begin_a_round_with_clients_that_have_not_trained_before(ranks, tmp_path: Path):
    """They begin with the mean of the others' personal parameters, which the other silo no longer has."""
    sampler, choices = UniformSampler(2), other_algorithms_choices()
    first, second = (set(sampler.sample(len(choices["sizes"]), 0, index)) for index in (0, ROUND))
    assert second - first
    assert_killed_and_bit_equal(ranks(2), "fedavg", choices | {"client_sampling": sampler}, tmp_path)


def assert_killed_and_bit_equal(pool, name: str, choices: dict[str, Any], folder: Path) -> None:
    """Let both silos leave, forget that silo 0 has saved, and compare the resumed run with an undisturbed one."""
    steps = max(1, choices["round"].steps - 1)
    assert pool.run(run_part, name, 2, choices, folder / "left", {0: (0, steps), 1: (0, steps)})[0] is None
    (saved,) = (folder / "left").glob("round-*/silo-0-*")
    shutil.rmtree(saved)
    assert_left_and_bit_equal(pool, name, 2, choices, folder)


def test_a_gpt_with_dropout(ranks, tmp_path: Path):
    assert_left_and_bit_equal(ranks(2), "sync", 1, text_choices(0.2), tmp_path, {0: (0, 2)})


@pytest.mark.parametrize("name", ["sync", "diloco"])
@pytest.mark.quick_rows(1)
def test_scaled_losses(ranks, name: str, tmp_path: Path):
    """With float16, the loss scale and its growth counter are state."""
    choices = text_choices(0.2) | {"autocast": torch.float16, "round": RoundOptions(steps=4)}
    assert_left_and_bit_equal(ranks(2), name, 2, choices, tmp_path, {0: (0, 2)})


def other_number_of_replicas(choices: dict[str, Any], folder: Path) -> tuple[Records, int]:
    """Resume the run here from the middle of a round, which other replicas have saved."""
    with distributed(1) as topology:
        run = case_run(topology, "sync", {"rounds": ROUNDS, "checkpoint.every_rounds": 1} | choices)
        checkpoints = Checkpointer(folder, topology, run.assignment_digest)
        start, records = checkpoints.latest(), Records()
        assert isinstance(start, ResumePoint) and start.mid_round
        fit(run, [records], resume_point=start)
        return records, len(start.mid_round)


def test_another_number_of_replicas_goes_on_at_the_same_step(ranks, tmp_path: Path):
    """Saved by 2 replicas, resumed by 1 and by 3: the same examples, so the same losses to float tolerance."""
    choices = text_choices(0.0) | {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
    assert ranks(2).run(run_part, "sync", 1, choices, tmp_path / "left", {0: (0, 2)})[0] is None
    alone = ranks(2).run(run_part, "sync", 1, choices, tmp_path / "alone", None)[0]
    for size in (1, 3):
        resumed, _ = ranks(size).run(other_number_of_replicas, choices, tmp_path / "left")[0]
        for one, other in zip(resumed.rounds[::-1], alone.rounds[::-1], strict=False):
            assert one["examples"] == other["examples"]
            assert_close({"loss": one["train/loss"]}, {"loss": other["train/loss"]}, 1e-5)
