"""Invalid command lines are refused with the key, the value, the valid values and a remedy.

test_unfit.py has the errors that appear only when the data and the model are built.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.command import HERE, Shell
from tests.cli.refusals import assert_says, composing
from trainer.commands import main as cli
from trainer.config.compose import compose_tree
from trainer.distributed.device import choose_device
from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.silos import silo_sizes
from trainer.distributed.topology import distributed

# Overrides, and the parts of the message.
UNKNOWN = {
    "a key": (["rouds=3"], ["rouds", "did you mean rounds?", "valid:", "batch_size"]),
    "a key of a section": (["round.epoch=2"], ["round.epoch", "did you mean round.epochs?", "valid:", "round.steps"]),
    "a section": (["rond.epochs=2"], ["rond.epochs", "did you mean round.epochs?"]),
    "a group": (["partion=dirichlet"], ["partion", "did you mean partition?"]),
    "a key that is a section": (["rounds.epochs=2"], ["rounds.epochs", "round.epochs"]),
    "a choice": (["algorithm=fedavgg"], ["algorithm=fedavgg", "did you mean fedavg?", "valid:", "diloco", "sync"]),
    "a choice unlike any": (["model=unheard"], ["model=unheard", "valid:", "digits_cnn", "mlp"]),
    "no choice": (["data=null"], ["data=null", "valid:", "digits"]),
    "an experiment": (["experiment=nothing"], ["experiment=nothing", "mnist_fedavg"]),
    "an argument": (["optimizer.momentum=0.9"], ["optimizer.momentum", "optimizer.lr", "+optimizer.momentum=..."]),
    "one of a few keys": (
        ["checkpoint.every_round=2"],
        ["did you mean checkpoint.every_rounds?", "valid: checkpoint.every_rounds, "],
    ),
    "a key unlike any of its section": (["round.foo=2"], ["round.foo is no key\n", "valid: round.epochs, round.steps"]),
    "a key of a section misspelt": (
        ["lauch.nproc_per_node=2"],
        ["did you mean launch.nproc_per_node?", "valid: launch.nproc_per_node, "],
    ),
    "a key added to a section": (["+round.epoch=2"], ["did you mean round.epochs?", "valid: round.epochs, "]),
    "a key of Hydra's": (["hydra.run.dir=x"], ["hydra.run.dir=x", "only in sweeps", "run_dir="]),
    "a group of Hydra's": (["hydra/launcher=x"], ["hydra/launcher=x", "only in sweeps"]),
    "a key of another choice": (["partition.alpha=1"], ["partition.alpha", "valid:", "partition.min_examples"]),
    "a key added": (["+new=1"], ["new"]),
    "no override": (["rounds"], ["rounds is no override", "key=value"]),
}
WRONG = {
    "no number": (["rounds=many"], ["rounds=many", "valid: a whole number from 1"]),
    "no whole number": (["rounds=2.5"], ["rounds=2.5", "valid: a whole number from 1"]),
    "too small": (["eval.every_rounds=0"], ["eval.every_rounds=0", "valid: a whole number from 1"]),
    "negative": (["seed=-1"], ["seed=-1", "valid: a whole number from 0"]),
    "empty": (["rounds="], ["rounds=", "valid: a whole number from 1"]),
    "null": (["batch_size=null"], ["batch_size=null", "valid: a whole number from 1, or all"]),
    "a word": (["batch_size=some"], ["batch_size=some", "or all"]),
    "silos": (["silos=nodes"], ["silos=nodes", "a whole number from 1", "[3,1]", "node"]),
    "silo sizes": (["silos=[2, 0]"], ["silos=[2,0]\n", "[3,1]"]),
    "silo words": (["silos=[a,true]"], ["silos=[a,true]\n"]),
    "a number as a name": (["name=2024"], ["name=2024\n", "valid: a text (digits as \"'7'\"), or null"]),
    "no clients": (["clients=0"], ["clients=0", "or auto"]),
    "a switch": (["run.smoke=yes"], ["run.smoke=yes", "valid: true or false"]),
    "one of few words": (["metrics.per_client=all"], ["metrics.per_client=all", "full", "scores", "none"]),
    "a target of no number": (["stop.metric_target=high"], ["stop.metric_target=high", "valid: a number, or null"]),
    "no patience": (["stop.patience_evaluations=0"], ["stop.patience_evaluations=0", "a whole number from 1, or null"]),
    "less than no time": (
        ["stop.max_training_seconds=-1"],
        ["stop.max_training_seconds=-1", "a number from 0, or null"],
    ),
    "a decay": (["ema_decay=1"], ["ema_decay=1", "a number from 0 to below 1, or null"]),
    "a fraction": (["data.validation=1"], ["data.validation=1", "from 0 to below 1"]),
    "no fraction": (["data.validation=some"], ["data.validation=some", "from 0 to below 1"]),
    "a section as a value": (["round=3"], ["round=3", "round.epochs", "round.steps"]),
    "a list cut short": (["silos=[1,"], ["silos=[1,"]),
    "missing": (["data=text"], ["data.path has no value", "set data.path="]),
    "missing size": (
        ["algorithm=fedavg", "client_sampling=sample"],
        ["client_sampling.clients_per_round has no value", "set client_sampling.clients_per_round="],
    ),
    "missing target": (["model=custom"], ["model._target_ has no value", "set model._target_="]),
}


@pytest.mark.parametrize(("overrides", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
@pytest.mark.quick_rows(7)
def test_unknown_keys_and_choices_are_answered_by_the_known_ones(overrides: list[str], message: list[str]) -> None:
    assert_says(composing(overrides), message)


@pytest.mark.parametrize("override", ["checkpoint.evry=2", "+checkpoint.evry=2", "lauch.nproc_per_node=2"])
def test_valid_keys_are_those_of_the_section(override: str) -> None:
    assert "batch_size" not in composing([override])


def test_no_experiment_is_the_default() -> None:
    with_null, without = compose_tree(["experiment=null", "run_dir=run"]), compose_tree(["run_dir=run"])
    assert with_null == without


@pytest.mark.parametrize(("overrides", "message"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.quick_rows(10)
def test_invalid_values_are_answered_by_the_valid_ones(overrides: list[str], message: list[str]) -> None:
    assert_says(composing(overrides), message)


def test_all_errors_are_reported_at_once_and_each_of_them_once() -> None:
    overrides = ["rouds=3", "algorithm=fedavgg", "batch_size=some", "round.epoch=2", "silos=0", "seed=1"]
    message = composing(overrides)
    assert_says(message, ["rouds", "algorithm=fedavgg", "batch_size=some", "round.epoch", "silos=0"])
    for fault in ("rouds is", "algorithm=fedavgg", "batch_size=some", "silos=0"):
        assert message.count(fault) == 1
    assert "seed" not in message.replace("name, seed", "")


@pytest.mark.parametrize(
    ("silos", "message"),
    [
        (3, ["silos=3", "4 ranks", "valid: 1, 2, 4", "silos=node", "launch.nproc_per_node=3"]),
        ([3, 2], ["silos=[3,2]", "5 ranks", "add up to 4", "launch.nproc_per_node=5"]),
    ],
)
def test_silos_that_do_not_divide_the_world_are_refused(silos: int | list[int], message: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^silos=") as refusal:
        silo_sizes(silos, [0, 0, 0, 0])
    assert_says(str(refusal.value), message)


@pytest.mark.parametrize("silos", [3, [2, 1]])
def test_under_torchrun_the_way_out_is_its_option(silos: int | list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 3") as refusal:
        silo_sizes(silos, [0, 0, 0, 0])
    assert "launch.nproc_per_node" not in str(refusal.value)


def test_nccl_between_cpus_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"^launch\.inter_silo_backend=nccl") as refusal,
        distributed(device="cpu", inter_silo_backend="nccl"),
    ):
        pass
    assert_says(str(refusal.value), ["on the CPU", "launch.inter_silo_backend=auto"])


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="has eight GPUs")
def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^launch\.nproc_per_node=8") as refusal:
        choose_device("cuda", ClusterEnvironment(local_world_size=8))
    visible = torch.cuda.device_count()
    assert_says(str(refusal.value), [f"{visible} are visible", "launch.device=cpu"])
    assert visible or "set launch.nproc_per_node=0" not in str(refusal.value), "no workers are no way out"


# From the command line


def test_the_launcher_refuses_before_it_starts_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = f"run_dir={tmp_path / 'run'}"
    for overrides in (["rouds=3"], ["silos=3"], ["silos=[3,1]", "algorithm=fedavg"]):
        assert cli.main([*HERE, run_dir, *overrides]) == 2
        message = capsys.readouterr()
        assert_says(message.err, [overrides[0].partition("=")[0]])
        assert message.out == ""
    assert list(tmp_path.iterdir()) == [], "and no run folder is made"


@pytest.mark.long
def test_bad_input_found_by_the_workers_ends_them_and_the_launcher(shell: Shell) -> None:
    """Each error is printed once, though two ranks find it; the exit code is 2, and nothing is trained."""
    ended = shell.train("data=mnist", "data.root=nowhere", "optimizer.lr=-1", "batch_size=1", "run_dir=run")
    assert (ended.code, ended.out) == (2, "")
    for fault in ("data.root=nowhere", "train-images-idx3-ubyte", "optimizer=", "batch_size=1 is"):
        assert ended.err.count(fault) == 1, ended.err
    assert "Traceback" not in ended.err
    folder = shell.folder / "run"
    assert json.loads((folder / "state.json").read_text())["status"] == "bad_input"
    assert not (folder / "metrics.jsonl").exists() and not (folder / "checkpoints").exists()
