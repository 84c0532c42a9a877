"""The files that a run leaves: the best model, what it has printed, what each rank did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import trainer
from tests.cli.command import Shell, work
from trainer.loggers import read_jsonl

OVERRIDES = (
    *("algorithm=fedavg", "silos=2", "clients=3", "rounds=3", "round.steps=4", "run_dir=run"),
    *("monitor=validation/worst_accuracy", "metrics.every_steps=2", "metrics.client_scores=[calibration_error]"),
    *("optimizer=schedulefree", "schedule=onecycle"),
)


@pytest.fixture(scope="module")
def folder(ranks, shell: Shell) -> Path:
    pytest.importorskip("pytorch_optimizer")
    ranks(2).run(work, list(OVERRIDES), str(shell.folder))
    return shell.folder / "run"


def test_the_best_model_is_a_file_that_a_notebook_loads(folder: Path):
    """Its accuracy on all digits differs from chance, and its round is the one of the best value."""
    result = json.loads((folder / "result.json").read_text())
    rounds = [line for line in read_jsonl(folder / "metrics.jsonl") if "step" not in line]
    values = [line["validation/worst_accuracy"] for line in rounds]
    assert result["monitor"] == "validation/worst_accuracy"
    assert (result["best_value"], result["best_round"]) == (max(values), values.index(max(values)) + 1)
    best, last = (trainer.load_model(folder, weights=weights) for weights in ("best", "last"))
    same = all(map(torch.equal, best.state_dict().values(), last.state_dict().values()))
    assert same == (result["best_round"] == 3)
    with pytest.raises(ValueError, match=r"has no ema\.safetensors"):
        trainer.load_model(folder, weights="ema")


def test_metrics_of_steps_and_of_the_machine_are_logged(folder: Path):
    lines = read_jsonl(folder / "metrics.jsonl")
    steps = [line for line in lines if "step" in line]
    assert len(steps) >= 3 * 2 and {line["round"] for line in steps} == {1, 2, 3}
    rounds = [line for line in lines if "step" not in line]
    assert any("system/cpu_percent" in line for line in rounds)
    assert all("client/2/test_calibration_error" in line for line in rounds)
    assert list((folder / "tensorboard-steps").iterdir())


def test_the_folder_has_what_was_printed_and_what_each_rank_did(folder: Path):
    console = (folder / "console.log").read_text()
    assert "workers   2 on cpu" in console and "round 3/3" in console and "\x1b" not in console
    for rank in range(2):
        log = (folder / "logs" / f"rank-{rank}.log").read_text()
        assert f"started: rank {rank} of 2, replica 0 of silo {rank}" in log
        assert log.count("trained clients: ") == 3
        assert ("checkpoint round-000003 written" in log) == (rank == 0), "the other has nothing of its own"
        assert log.rstrip().endswith("ended: finished")


def test_a_single_client_is_said_to_be_alone(ranks, shell: Shell):
    ranks(1).run(work, ["rounds=1", "round.steps=1", "algorithm=fedavg", "run_dir=one"], str(shell.folder))
    assert "clients   1: it trains alone" in (shell.folder / "one" / "console.log").read_text()
