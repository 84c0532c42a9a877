"""`data.files`: one file a client, which only the client's silo opens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.cli.command import work
from tests.cli.refusals import assert_says, building
from trainer.config.build import build
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.data import PerClientSource, TableEncoder, TensorSource
from trainer.distributed import collectives
from trainer.distributed.topology import Topology, distributed

MODEL = ["model=mlp", "model.inputs=4", "model.hidden=8", "model.classes=3"]
TRAINING = ["algorithm=fedavg", "rounds=2", "optimizer.lr=0.1", "data.validation=0", "metrics.per_client=scores"]
SIZES = {"a": 50, "b": 30, "c": 41}


def write(folder: Path, name: str, **changes: np.ndarray) -> None:
    """Write a client's file: points around a client's own centre, with a test set."""
    generator = np.random.default_rng(ord(name))
    arrays = {}
    for part, size in (("train", SIZES[name]), ("test", 10)):
        points = generator.normal(size=(size, 4))
        arrays |= {f"x_{part}": points, f"y_{part}": points[:, :3].argmax(1), f"site_{part}": np.full(size, ord(name))}
        arrays[f"weight_{part}"] = np.abs(points[:, 3])
    np.savez(folder / f"{name}.npz", **(arrays | changes))


def in_own_folder(folder: str, function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a folder that has only the files of this rank."""
    here = Path.cwd()
    os.chdir(Path(folder) / f"rank-{dist.get_rank()}")
    try:
        return function(*arguments)
    finally:
        os.chdir(here)
        collectives.barrier()


def folders(root: Path, *names: str) -> None:
    """Make a folder for each rank, with these files in it."""
    for rank, held in enumerate(names):
        (root / f"rank-{rank}").mkdir(parents=True)
        for name in held:
            write(root / f"rank-{rank}", name)


def train(ranks, root: Path, *overrides: str, size: int = 2, name: str = "run") -> Path:
    """Train a run in which every rank sees only its folder, and return the run folder."""
    run = root / name
    ranks(size).run(in_own_folder, str(root), work, ["data=npz", *MODEL, *TRAINING, *overrides, f"run_dir={run}"])
    return run


def test_a_silo_needs_its_own_files_only(ranks, tmp_path: Path) -> None:
    """The other silo's files do not exist here, so opening them would fail; also when the run resumes."""
    folders(tmp_path, "ab", "c")
    run = train(ranks, tmp_path, "data.files=[a.npz,b.npz,c.npz]", "silos=2", "run.smoke=true")
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 6
    assert json.loads((run / "state.json").read_text())["status"] == "finished"


def test_a_custom_reader_is_called_once_per_file(ranks, tmp_path: Path) -> None:
    """It only needs a `path` argument."""
    folders(tmp_path, "a", "b")
    run = train(ranks, tmp_path, "data=custom", "data._target_=trainer.data.npz", "data.files=[a.npz,b.npz]", "silos=2")
    assert json.loads((run / "result.json").read_text())["examples"] == 2 * (SIZES["a"] + SIZES["b"])


def test_replicas_of_a_silo_share_its_files(ranks, tmp_path: Path) -> None:
    folders(tmp_path, "ab", "ab", "c", "c")
    run = train(ranks, tmp_path, "data.files=[a.npz,b.npz,c.npz]", "silos=2", size=4)
    assert json.loads((run / "result.json").read_text())["examples"] == 2 * sum(SIZES.values())


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "sync"])
def test_files_are_the_clients_of_one_file_with_client_ids(ranks, tmp_path: Path, algorithm: str) -> None:
    """The same clients in one file, by a column, give the same model. So do weights, of which only sums are sent."""
    names = "ab" if algorithm != "sync" else "abc"
    held = list(names) if algorithm != "sync" else [names, names]
    folders(tmp_path, *held)
    parts = [np.load(tmp_path / f"rank-{rank}" / f"{n}.npz") for rank, some in enumerate(held) for n in some]
    joined = {key: np.concatenate([part[key] for part in parts[: len(names)]]) for key in parts[0]}
    for rank in range(2):
        np.savez(tmp_path / f"rank-{rank}/all.npz", **joined)
    chosen = [f"algorithm={algorithm}", f"silos={1 if algorithm == 'sync' else 2}"]
    chosen += ["data.weights=weight", "task.class_weights=balanced"] if algorithm != "scaffold" else []
    files = train(ranks, tmp_path, f"data.files=[{','.join(f'{n}.npz' for n in names)}]", *chosen, name="files")
    one = ["data.path=all.npz", "data.client_ids=site", "partition=natural", f"clients={len(names)}"]
    whole = train(ranks, tmp_path, *one, *chosen, name="whole")
    models = [load_file(run / "model.safetensors") for run in (files, whole)]
    for name, tensor in models[0].items():
        assert torch.allclose(tensor, models[1][name], atol=1e-6), name


def write_tables(folder: Path, name: str, cities: str) -> None:
    """Write a client's table, and tables of test and validation examples, in which values are missing."""
    generator = np.random.default_rng(ord(name))
    for part in (name, f"{name}-test", f"{name}-val"):
        rows = [
            (f"{generator.normal():.3f}" if row % 5 else "", cities[row % len(cities)] if row % 7 else "", row % 3)
            for row in range(30)
        ]
        (folder / f"{part}.csv").write_text("x,city,label\n" + "".join(f"{x},{city},{y}\n" for x, city, y in rows))


def test_silos_agree_on_the_columns_of_tables(ranks, tmp_path: Path) -> None:
    """Each has a city that the other lacks. The matrix has the columns of both, and the run keeps how they are made."""
    for rank, (name, cities) in enumerate((("a", "RB"), ("b", "RK"))):
        (tmp_path / f"rank-{rank}").mkdir()
        write_tables(tmp_path / f"rank-{rank}", name, cities)
        for part in ("test", "val"):
            (tmp_path / f"rank-{rank}/{name}-{part}.csv").rename(tmp_path / f"rank-{rank}/{part}.csv")
    chosen = ["data=csv", "data.files=[a.csv,b.csv]", "data.test_path=test.csv", "data.validation_path=val.csv"]
    chosen += ["data.columns.number=[x]", "data.columns.category=[city]", "data.validation=auto", "silos=2"]
    run = train(ranks, tmp_path, *chosen, "model.inputs=4", "run.smoke=true")
    encoder = TableEncoder.load(run / "columns.json")
    assert encoder.categories["city"].categories == ("B", "K", "R") and encoder.categories["city"].fill == "R"
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["validation/accuracy"] <= 1 and result["examples"] == 2 * 60


def refused(overrides: list[str]) -> str:
    """Return the error on this rank of two silos."""
    with distributed(silos=2, device="cpu") as topology, pytest.raises(ValueError, match=r"^data\.path=") as error:
        build(read_config(compose_tree(overrides)), topology)
    return str(error.value)


def test_errors_of_every_silo_are_reported_once_on_all_ranks(ranks, tmp_path: Path) -> None:
    folders(tmp_path, "ab", "c")
    write(tmp_path / "rank-0", "a", y_train=np.full(50, -1))
    (tmp_path / "rank-1/c.npz").write_bytes(b"")
    overrides = ["data=npz", *MODEL, "algorithm=fedavg", "data.files=[a.npz,b.npz,c.npz]"]
    message, again = ranks(2).run(in_own_folder, str(tmp_path), refused, overrides)
    assert message == again
    assert_says(message, ["data.path=a.npz cannot be used", "50 of 50", "data.path=c.npz cannot be used", "cut short"])
    assert message.count("a.npz") == message.count("c.npz") == 1


def fingerprint_of(overrides: list[str]) -> str:
    with distributed(silos=2, device="cpu") as topology:
        return build(read_config(compose_tree(overrides)), topology).data_fingerprint


def test_a_file_that_changed_is_another_data_set(ranks, tmp_path: Path) -> None:
    """All ranks refuse to resume a run with it."""
    folders(tmp_path, "a", "c")
    overrides = ["data=npz", *MODEL, "algorithm=fedavg", "data.files=[a.npz,c.npz]"]
    reported = ranks(2).run(in_own_folder, str(tmp_path), fingerprint_of, overrides)
    write(tmp_path / "rank-1", "c", x_test=np.zeros((10, 4)))
    changed = ranks(2).run(in_own_folder, str(tmp_path), fingerprint_of, overrides)
    assert reported[0] == reported[1] != changed[0] == changed[1]


@pytest.fixture
def topology(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write(tmp_path, name)
    with distributed(device="cpu") as topology:
        yield topology


FILES = ["data=npz", *MODEL, "data.files=[a.npz,b.npz]"]
REFUSED = {
    "another number of clients": ([*FILES, "clients=3"], ["clients=3", "2 data.files", "set clients=2"]),
    "a partition": ([*FILES, "partition=shards"], ["partition=shards with data.files", "leave partition= out"]),
    "a path as well": ([*FILES, "data.path=c.npz"], ["data.path=c.npz and data.files=[a.npz,b.npz]", "set one"]),
    "data without a path": (["data=digits", "data.files=[a.npz]"], ["data.path is no argument of trainer.data.digits"]),
    "no list": (["data=npz", "data.files=a.npz", "data.path=a"], ["data.files=a.npz\n", "[a.npz,b.npz], or null"]),
    "other examples": ([*FILES, "data.inputs=z"], ["inputs: a.npz has float32 [2], but b.npz float32 [3]"]),
    "other labels": (
        [*FILES, "data.targets=names"],
        ["label_names: a.npz has ['cat', 'dog'], but b.npz ['dog', 'fox']", "set data.classes="],
    ),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(overrides: list[str], message: list[str], topology: Topology) -> None:
    for name, width, labels in (("a", 2, ["dog", "cat"]), ("b", 3, ["fox", "dog"])):
        extra = {"z_train": np.zeros((SIZES[name], width)), "z_test": np.zeros((10, width))}
        extra |= {"names_train": np.resize(labels, SIZES[name]), "names_test": np.resize(labels, 10)}
        write(Path(), name, **extra)
    assert_says(building(overrides, topology), message)


def test_examples_of_several_clients_are_fetched_in_the_order_asked_for() -> None:
    """Local examples come first; a batch may span several clients."""
    sources = {
        1: TensorSource(torch.arange(10, 13.0)[:, None], torch.arange(3)),
        3: TensorSource(torch.full((2, 1), 30.0), torch.arange(2)),
    }
    source = PerClientSource([4, 3, 5, 2], sources, [0, 1, 0, 1], [0, 0, 0, 0])
    assert len(source) == 14
    assert [source.ids(client).tolist()[0] for client in range(4)] == [5, 0, 9, 3]
    inputs, targets = source.fetch(torch.tensor([4, 0, 3, 2]))
    assert inputs.flatten().tolist() == [30.0, 10.0, 30.0, 12.0] and targets.tolist() == [1, 0, 0, 2]
    assert source.fetch(torch.empty(0, dtype=torch.int64))[0].shape == (0, 1)
    with pytest.raises(AssertionError, match="client 2 are in silo 0"):
        source.fetch(torch.tensor([9]))
