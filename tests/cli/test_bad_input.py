"""What a user got wrong is said before anything is trained: the key, the value, what is valid, and the way out."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.command import HERE, Shell
from trainer import cli
from trainer.build import build
from trainer.compose import compose_tree
from trainer.config import read_config
from trainer.data import Arrays, Splits
from trainer.topology import Place, Topology, choose_device, distributed, silo_sizes

# Overrides, and what the message must hold.
UNKNOWN = {
    "a key": (["rouds=3"], ["rouds", "did you mean rounds?", "valid:", "batch_size"]),
    "a key of a section": (["round.epoch=2"], ["round.epoch", "did you mean round.epochs?", "valid:", "round.steps"]),
    "a section": (["rond.epochs=2"], ["rond.epochs", "did you mean round.epochs?"]),
    "a group": (["partion=dirichlet"], ["partion", "did you mean partition?"]),
    "a key that is a section": (["rounds.epochs=2"], ["rounds.epochs", "round.epochs"]),
    "a choice": (["algorithm=fedavgg"], ["algorithm=fedavgg", "did you mean fedavg?", "valid:", "diloco", "sync"]),
    "a choice unlike any": (["model=resnet"], ["model=resnet", "valid:", "digits_cnn", "mlp"]),
    "no choice": (["data=null"], ["data=null", "valid:", "digits"]),
    "an experiment": (["experiment=nothing"], ["experiment=nothing", "mnist_fedavg"]),
    "an argument": (["optimizer.momentum=0.9"], ["optimizer.momentum", "optimizer.lr", "+optimizer.momentum=..."]),
    "a key of another choice": (["partition.alpha=1"], ["partition.alpha", "valid:", "partition.min_examples"]),
    "a key added": (["+new=1"], ["new"]),
    "no override": (["rounds"], ["rounds is no override", "key=value"]),
}
WRONG = {
    "no number": (["rounds=many"], ["rounds=many", "valid: a whole number from 1"]),
    "no whole number": (["rounds=2.5"], ["rounds=2.5", "valid: a whole number from 1"]),
    "too small": (["eval.every=0"], ["eval.every=0", "valid: a whole number from 1"]),
    "negative": (["seed=-1"], ["seed=-1", "valid: a whole number from 0"]),
    "empty": (["rounds="], ["rounds=", "valid: a whole number from 1"]),
    "null": (["batch_size=null"], ["batch_size=null", "valid: a whole number from 1, or all"]),
    "a word": (["batch_size=some"], ["batch_size=some", "or all"]),
    "silos": (["silos=nodes"], ["silos=nodes", "a whole number from 1", "[3,1]", "node"]),
    "silo sizes": (["silos=[2,0]"], ["silos=[2", "[3,1]"]),
    "no clients": (["clients=0"], ["clients=0", "or auto"]),
    "a switch": (["run.smoke=yes"], ["run.smoke=yes", "valid: true or false"]),
    "one of few words": (["report.per_client=all"], ["report.per_client=all", "full", "scores", "none"]),
    "a fraction": (["data.validation=1"], ["data.validation=1", "from 0 to below 1"]),
    "no fraction": (["data.validation=some"], ["data.validation=some", "from 0 to below 1"]),
    "a section as a value": (["round=3"], ["round=3", "round.epochs", "round.steps"]),
    "a list cut short": (["silos=[1,"], ["silos=[1,"]),
    "missing": (["data=text"], ["data.path has no value", "set data.path="]),
    "missing size": (["algorithm=fedavg", "cohort=sample"], ["cohort.size has no value", "set cohort.size="]),
    "missing target": (["model=custom"], ["model._target_ has no value", "set model._target_="]),
}


@pytest.mark.parametrize(("overrides", "said"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_is_unknown_is_answered_by_what_is_known(overrides: list[str], said: list[str]) -> None:
    assert_says(composing(overrides), said)


@pytest.mark.parametrize(("overrides", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_value_is_answered_by_what_is_valid(overrides: list[str], said: list[str]) -> None:
    assert_says(composing(overrides), said)


def test_all_faults_are_said_at_once_and_each_of_them_once() -> None:
    overrides = ["rouds=3", "algorithm=fedavgg", "batch_size=some", "round.epoch=2", "silos=0", "seed=1"]
    said = composing(overrides)
    assert_says(said, ["rouds", "algorithm=fedavgg", "batch_size=some", "round.epoch", "silos=0"])
    for fault in ("rouds is", "algorithm=fedavgg", "batch_size=some", "silos=0"):
        assert said.count(fault) == 1
    assert "seed" not in said.replace("valid: name, seed", "")


# What can be seen only with the data and the model at hand.


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with distributed(device="cpu") as topology:
        yield topology


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that one is in, with a text of 100 bytes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    (tmp_path / "latin.txt").write_bytes("0123456789 naïf".encode("latin1"))
    return tmp_path


TEXT = ["data=text", "data.path=a.txt", "data.length=8"]
FEDAVG = ["algorithm=fedavg", "silos=2"]
UNFIT = {
    "more clients than examples": (
        [*FEDAVG, "clients=2000"],
        ["clients=2000", "1438", "set clients=1438 or fewer"],
    ),
    "more examples a client than there are": (
        [*FEDAVG, "partition=dirichlet", "partition.min_examples=1000"],
        ["partition.min_examples=1000", "clients=2", "719 or less"],
    ),
    "fewer clients than silos": ([*FEDAVG, "clients=1"], ["clients=1", "2 silos", "2 or more"]),
    "sync with silos": (["silos=2"], ["silos=2", "algorithm=sync", "set silos=1, or algorithm=fedavg"]),
    "too small a batch": (["silos=[2]", "batch_size=1"], ["batch_size=1", "2 replicas", "2 or more, or all"]),
    "too large a cohort": (
        [*FEDAVG, "clients=4", "cohort=sample", "cohort.size=5"],
        ["cohort.size=5", "4 clients", "1 to 4"],
    ),
    "an empty cohort": ([*FEDAVG, "cohort=sample", "cohort.size=0"], ["cohort.size=0", "1 to 2"]),
    "half a client": ([*FEDAVG, "cohort=sample", "cohort.size=1.5"], ["cohort.size=1.5"]),
    "a cohort of no number": ([*FEDAVG, "cohort=sample", "cohort.size=few"], ["cohort.size=few"]),
    "alpha": ([*FEDAVG, "partition=dirichlet", "partition.alpha=-1"], ["partition.alpha=-1", "above 0"]),
    "alpha of no number": ([*FEDAVG, "partition=dirichlet", "partition.alpha=low"], ["partition.alpha=low"]),
    "shards of no number": ([*FEDAVG, "partition=shards", "partition.per_client=few"], ["partition.per_client=few"]),
    "no owners": ([*FEDAVG, "partition=natural"], ["partition=natural", "no owners", "set partition=iid"]),
    "no labels": ([*TEXT, *FEDAVG, "partition=dirichlet"], ["partition=dirichlet", "no labels", "partition=iid"]),
    "weights": ([*FEDAVG, "algorithm.weight=exmples"], ["algorithm.weight=exmples", "examples", "equal"]),
    "inner state": ([*FEDAVG, "algorithm.inner_state=kept"], ["algorithm.inner_state=kept", "keep", "reset"]),
    "a missing folder": (
        ["data=mnist", "data.root=nowhere"],
        ["data.root=nowhere", "train-images", "t10k-labels", "set data.root="],
    ),
    "a missing text": (["data=text", "data.path=b.txt"], ["data.path=b.txt"]),
    "a text of another code": (["data=text", "data.path=latin.txt"], ["data.path=latin.txt", "byte 13", "iconv"]),
    "too short a text": (["data=text", "data.path=a.txt"], ["data.path=a.txt", "100 bytes", "257", "data.length="]),
    "windows of no length": ([*TEXT, "data.length=0"], ["data.length=0", "at least 1"]),
    "no test set": ([*TEXT, "data.test=2"], ["data.test=2", "between 0 and 1"]),
    "classes": (["model.classes=7"], ["7 outputs", "10 classes", "set model.classes=10"]),
    "a model of another shape": (["model=mlp"], ["model=MLP", "[1, 8, 8]"]),
    "a vocabulary": ([*TEXT, "model.vocabulary=7"], ["model=GPT", "model.vocabulary=256"]),
    "heads": ([*TEXT, "model.heads=3"], ["model.width=128", "model.heads=3"]),
    "another task": ([*TEXT, "task=classification"], ["model=GPT", "Classification", "[batch, classes]"]),
    "a rate": (["optimizer.lr=-1"], ["optimizer", "-1"]),
    "a rate of no number": (["optimizer.lr=fast"], ["optimizer.lr=fast"]),
    "a server's rate": ([*FEDAVG, "server.lr=-1"], ["server", "-1"]),
    "a schedule": (["schedule=cosine", "schedule.warmup=2"], ["schedule.warmup=2", "0 to 1"]),
    "a channel of no number": (["model.channels=wide"], ["model.channels=wide"]),
    "an argument too many": (["+model.width=3"], ["model", "DigitsCNN", "width"]),
    "no such module": (["model._target_=nowhere.Net"], ["model=nowhere.Net", "No module named 'nowhere'"]),
    "no such class": (["model._target_=torch.nn.Net"], ["model=torch.nn.Net", "No module named 'torch.nn.Net'"]),
    "no data": (["data=custom", "data._target_=os.getcwd"], ["data=os.getcwd", "str", "trainer.data.Splits"]),
}


@pytest.mark.parametrize(("overrides", "said"), UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.usefixtures("folder")
def test_what_does_not_fit_is_said(overrides: list[str], said: list[str], topology: Topology) -> None:
    assert_says(building(overrides, topology), said)


@pytest.mark.usefixtures("folder")
def test_faults_of_all_parts_are_said_at_once(topology: Topology) -> None:
    overrides = ["data=mnist", "data.root=nowhere", "optimizer.lr=-1", "server.lr=-2", "silos=[2]", "batch_size=1"]
    said = building([*overrides, "algorithm=fedavg", "schedule=cosine", "schedule.final=3"], topology)
    assert_says(said, ["data.root=nowhere", "optimizer", "-1", "server", "-2", "batch_size=1", "schedule.final=3"])


@pytest.mark.usefixtures("folder")
def test_a_model_that_does_not_fit_is_said_beside_what_else_is_wrong(topology: Topology) -> None:
    said = building(["silos=[2]", "batch_size=1", "model.classes=7"], topology)
    assert_says(said, ["batch_size=1", "set model.classes=10"])


def idx(array: np.ndarray) -> bytes:
    """The array as an IDX file."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(folder: Path) -> Path:
    """MNIST's four files with 20 and 10 images."""
    root = folder / "mnist"
    root.mkdir()
    for part, examples in (("train", 20), ("t10k", 10)):
        images, labels = np.zeros((examples, 28, 28)), np.arange(examples) % 10
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return root


MNIST = ["data=mnist", "data.root=mnist", "model=mlp"]


def test_images_that_are_right_are_taken(small_mnist: Path, topology: Topology) -> None:
    assert len(build(read_config(compose_tree(MNIST)), topology).data.train) == 20


def test_damaged_files_are_said_with_what_is_wrong_with_each(small_mnist: Path, topology: Topology) -> None:
    images, labels = small_mnist / "train-images-idx3-ubyte.gz", small_mnist / "t10k-labels-idx1-ubyte"
    images.write_bytes(images.read_bytes()[:-20])
    labels.write_bytes(labels.read_bytes()[:-3])
    (small_mnist / "train-labels-idx1-ubyte").write_bytes(b"<html>not found")
    said = building(MNIST, topology)
    assert_says(said, ["data.root=mnist", images.name, labels.name, "cut short", "not an IDX file", "Fetch it again"])


def test_a_label_outside_the_classes_of_a_file_is_said(small_mnist: Path, topology: Topology) -> None:
    (small_mnist / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(20) % 12))
    assert_says(building(MNIST, topology), ["data.root=mnist", "label 10 of example 10", "outside 0..9"])


def own_data(labels: list[int]) -> Splits:
    """One's own data of three classes, its training examples with these labels."""
    tests = Arrays(torch.zeros(3, 1, 8, 8), torch.arange(3))
    return Splits(Arrays(torch.zeros(len(labels), 1, 8, 8), torch.tensor(labels)), tests, 3)


@pytest.mark.parametrize("outside", [3, -1])
def test_a_label_outside_the_classes_of_ones_own_data_is_said(outside: int, topology: Topology) -> None:
    """Wherever it is among the examples, in the training or the test set."""
    labels = ",".join(map(str, [0, 1, 2] * 5 + [outside]))
    own = ["data=custom", f"data._target_={__name__}.own_data", f"+data.labels=[{labels}]", "model.classes=3"]
    assert_says(building(own, topology), ["data", f"label {outside}", "3 classes"])


@pytest.mark.parametrize(
    ("silos", "said"),
    [
        (3, ["silos=3", "4 ranks", "valid: 1, 2, 4", "silos=node", "launch.nproc=3"]),
        ([3, 2], ["silos=[3,2]", "5 ranks", "add up to 4", "launch.nproc=5"]),
    ],
)
def test_silos_that_do_not_divide_the_world_are_said(silos: int | list[int], said: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        silo_sizes(silos, [0, 0, 0, 0])
    assert_says(str(refusal.value), said)


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="has eight GPUs")
def test_more_workers_than_gpus_are_said() -> None:
    with pytest.raises(ValueError) as refusal:
        choose_device("cuda", Place(local_world_size=8))
    visible = torch.cuda.device_count()
    assert_says(str(refusal.value), ["launch.nproc=8", f"{visible} are visible", "launch.device=cpu"])
    assert visible or "set launch.nproc=0" not in str(refusal.value), "no workers are no way out"


# As a user meets it


def test_the_launcher_says_it_before_it_starts_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = f"run_dir={tmp_path / 'run'}"
    for overrides in (["rouds=3"], ["silos=3"], ["silos=[3,1]", "algorithm=fedavg"]):
        assert cli.main([*HERE, run_dir, *overrides]) == 2
        said = capsys.readouterr()
        assert_says(said.err, [overrides[0].partition("=")[0]])
        assert said.out == ""
    assert list(tmp_path.iterdir()) == [], "and no run folder is made"


def test_bad_input_found_by_the_workers_ends_them_and_the_launcher(shell: Shell) -> None:
    """Each fault once, though two ranks find them; exit code 2; nothing trained."""
    ended = shell.train("data=mnist", "data.root=nowhere", "optimizer.lr=-1", "batch_size=1", "run_dir=run")
    assert (ended.code, ended.out) == (2, "")
    for fault in ("data.root=nowhere", "train-images-idx3-ubyte: ", "optimizer=", "batch_size=1 is"):
        assert ended.err.count(fault) == 1, ended.err
    assert "Traceback" not in ended.err
    folder = shell.folder / "run"
    assert json.loads((folder / "state.json").read_text())["status"] == "bad_input"
    assert not (folder / "metrics.jsonl").exists() and not (folder / "checkpoints").exists()


def composing(overrides: list[str]) -> str:
    with pytest.raises(ValueError) as refusal:
        compose_tree(overrides)
    return str(refusal.value)


def building(overrides: list[str], topology: Topology) -> str:
    """What is said when the run is composed, or else built, for as many ranks as `silos` asks for."""
    with pytest.raises(ValueError) as refusal:
        config = read_config(compose_tree(overrides))
        assert not isinstance(config.silos, str)
        sizes = silo_sizes(config.silos, [0] * (sum(config.silos) if isinstance(config.silos, list) else config.silos))
        build(config, replace(topology, silo_sizes=sizes))
    return str(refusal.value)


def assert_says(message: str, parts: list[str]) -> None:
    """The message holds all the parts, and nothing of how the program works inside."""
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in:\n{message}"
    foreign = [word for word in ("Traceback", "hydra.cc", "NoneType", "not supported between") if word in message]
    assert not foreign, f"{foreign} in:\n{message}"
