"""Runs whose workers, sites or coordinators are killed at any moment end with the weights of an undisturbed run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from scripts.chaos.cases import CASES, SHARDED_CASES
from scripts.chaos.compare import differences
from scripts.chaos.kills import IN_TWENTY, Kill, Kind, plan, shares
from scripts.chaos.marks import Mark
from scripts.chaos.sites import strikes
from tests.cli.command import Shell
from trainer.checkpoint.format import Shard, part_name, write_shard, write_tensors


def kills_of(shell: Shell, *options: str, within_seconds: float) -> Counter[Kind]:
    """Return the kills by kind, after checking that every run ended like the undisturbed one."""
    ended = shell.start("-m", "scripts.chaos", "--folder", "runs", *options).end(within_seconds)
    assert ended.code == 0, ended.out + ended.err
    assert all(f"{case}, run 1: " in ended.out for case in CASES) and "NOT EQUAL" not in ended.out
    lines = [line for line in ended.out.splitlines() if "  pid " in line]
    return Counter(kind for line in lines for kind in Kind if f" s  {kind} " in line)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_kills(shell: Shell) -> None:
    """Each kind of kill happens."""
    counts = kills_of(shell, "--kills", "20", within_seconds=1500)
    assert set(counts) == set(Kind)
    assert all(counts[kind] >= count for kind, count in IN_TWENTY.items()), counts


@pytest.mark.long
@pytest.mark.timeout(600)
def test_four_kills_of_models_in_parts(shell: Shell) -> None:
    options = ("--shard", "--kills", "4", "--rounds", "4")
    ended = shell.start("-m", "scripts.chaos", "--folder", "runs", *options).end(500)
    assert ended.code == 0 and "NOT EQUAL" not in ended.out, ended.out + ended.err
    assert ended.out.count("  pid ") >= 4 and all(f"{case}, run 1: " in ended.out for case in SHARDED_CASES)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_six_combinations(shell: Shell) -> None:
    """Random choices together, each run stopped twice and killed once."""
    ended = shell.start("-m", "scripts.chaos", "--folder", "runs", "--combinations", "6").end(1000)
    assert ended.code == 0 and ended.out.count(": equal, ") == 6, ended.out + ended.err


def strikes_of(shell: Shell, *options: str, within_seconds: float) -> Counter[strikes.Kind]:
    """Return the strikes at sites and their coordinator by kind; each run must end like the undisturbed one."""
    ended = shell.start("-m", "scripts.chaos", "--sites", "--folder", "runs", *options).end(within_seconds)
    assert ended.code == 0 and "NOT EQUAL" not in ended.out, ended.out + ended.err
    return Counter(kind for line in ended.out.splitlines() for kind in strikes.Kind if f" s  {kind}  " in line)


def test_two_kills_of_a_federation(new_shell: Callable[[], Shell]) -> None:
    """A site and the coordinator are killed, and started again."""
    options = ("--kills", "2", "--cases", "fedavg", "--rounds", "3")
    counts = strikes_of(new_shell(), *options, within_seconds=300)
    assert counts == {strikes.Kind.SITE: 1, strikes.Kind.COORDINATOR: 1}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twelve_kills_of_federations(new_shell: Callable[[], Shell]) -> None:
    """Among them are ranks of sites; sites and coordinators are preempted and paused, too."""
    options = ("--kills", "12", "--cases", "adam", "scaffold", "topk", "--rounds", "8")
    counts = strikes_of(new_shell(), *options, within_seconds=1500)
    assert sum(counts[kind] for kind in strikes.KILLS) == 12
    assert set(counts) >= {strikes.Kind.RANK, *strikes.OTHERS}


# Differences between runs are found


def write_run(folder: Path, weight: Tensor, losses: dict[int, float], seconds: float) -> Path:
    """Write the compared files of a finished run, and return the folder."""
    part = Shard("silo-0.replica-0", ("silo-0.replica-0",), "attempt")
    state = {"model": {"weight": weight}, "algorithm": {"server": {}}, "clients": {"0": {"step": 3}}}
    state["cut"] = {"parts": 1}
    write_shard(folder / "checkpoints/round-000002", part, {part_name(0): state})
    write_tensors(folder / "model.safetensors", {"weight": weight})
    rounds = [{"round": round, "train/loss": loss, "seconds": seconds} for round, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
    (folder / "result.json").write_text(json.dumps(rounds[-1]))
    return folder


WEIGHT, LOSSES = torch.ones(3), {1: 0.5, 2: 0.25}


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    return write_run(tmp_path / "alone", WEIGHT, LOSSES, 1.0)


def test_clocks_are_not_compared(alone: Path, tmp_path: Path) -> None:
    assert differences(alone, write_run(tmp_path / "other", WEIGHT, LOSSES, 2.0)) == []


def test_the_last_bit_of_a_weight_is_compared(alone: Path, tmp_path: Path) -> None:
    near = torch.nextafter(WEIGHT, torch.tensor([1.0, 1.0, 2.0]))
    message = differences(alone, write_run(tmp_path / "other", near, LOSSES, 1.0))
    assert message == ["checkpoint: part-0/model/weight differs", "model.safetensors differs"]


def test_the_figures_of_every_round_are_compared(alone: Path, tmp_path: Path) -> None:
    message = differences(alone, write_run(tmp_path / "other", WEIGHT, {1: 0.75, 2: 0.25}, 1.0))
    assert message == ["metrics.jsonl, round 1: train/loss is 0.75, not 0.5"]


def test_a_round_that_is_told_twice_is_seen(alone: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", WEIGHT, LOSSES, 1.0)
    lines = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(lines + lines.splitlines(keepends=True)[-1])
    assert differences(alone, other) == ["metrics.jsonl: the rounds are [1, 2, 2]"]


# The kind that a kill counts as


def kill(meant: Kind, doing: str = "training", saving: str = "", aside: int = 0, age: float = 9.0) -> Kill:
    return Kill(10.0, meant, 1, 42, age, Mark(42, 7, doing, saving), aside, 0)


@pytest.mark.parametrize(
    ("hit", "kind"),
    [
        (kill(Kind.SAVE, saving="round-000001/silo-0.replica-0: tensors", aside=4096), Kind.SAVE),
        (kill(Kind.SAVE, saving="round-000001/silo-0.replica-0: tensors"), Kind.RANDOM),
        (kill(Kind.SAVE, saving="round-000001/silo-0.replica-0: whole"), Kind.RANDOM),
        (kill(Kind.COMBINATION, doing="combining > vectors"), Kind.COMBINATION),
        (kill(Kind.COMBINATION, doing="evaluating > scalars"), Kind.RANDOM),
        (kill(Kind.RANK_0), Kind.RANDOM),
        (kill(Kind.START, age=0.5), Kind.START),
        (kill(Kind.START), Kind.RANDOM),
        (kill(Kind.ROW, age=0.5), Kind.RANDOM),
    ],
)
def test_a_kill_counts_as_what_it_hit(hit: Kill, kind: Kind) -> None:
    """Before the first byte and after the last rename, a kill is not inside a save; the first start follows no kill."""
    assert hit.kind is kind


@pytest.mark.parametrize("kills", [1, 6, 20, 200])
def test_kinds_are_planned_in_proportion(kills: int) -> None:
    planned = plan(kills, CASES, Random(0))
    assert sum(map(len, planned.values())) == sum(shares(kills, IN_TWENTY).values()) == kills
    assert all(abs(count - kills * IN_TWENTY[kind] / 20) < 1 for kind, count in shares(kills, IN_TWENTY).items())
