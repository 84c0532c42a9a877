"""The picture of a partition: a dot for each client and label, its area the number of examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.commands.main import main
from trainer.commands.partition.plot import draw
from trainer.data import Iid, Shards, TensorSource


def labelled(examples: int, classes: int) -> TensorSource:
    return TensorSource(torch.zeros(examples, 1), torch.arange(examples) % classes)


def test_areas_are_numbers_of_examples():
    """Each dot is at its client and label, the first label at the top."""
    source = TensorSource(torch.zeros(7, 1), torch.tensor([0, 0, 0, 0, 2, 2, 1]))
    clients = Shards(per_client=1).split(source, source, 2, 0)
    counts = np.stack([np.bincount(source.labels[ids], minlength=3) for ids in clients.train])
    axes = draw(clients, source, ("a", "b", "c")).axes[0]
    (dots,) = axes.collections
    drawn = np.zeros((2, 3))
    for (client, label), area in zip(np.asarray(dots.get_offsets()).astype(int), dots.get_sizes(), strict=True):
        drawn[client, label] = area
    assert drawn == pytest.approx(counts / counts.max() * drawn.max())
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    lower, upper = axes.get_ylim()
    assert lower > upper, "the first label is the upper one"


@pytest.mark.parametrize("classes", [30, 1])
def test_many_clients_and_many_labels_fit(classes: int):
    source = labelled(4000, classes)
    clients = Iid().split(source, source, 1000, 0)
    figure = draw(clients, source)
    assert figure.get_figwidth() <= 42
    if classes == 1:
        (dots,) = figure.axes[0].collections
        assert np.sqrt(dots.get_sizes().max()) <= 72 * figure.get_figwidth() / 1000, "dots do not overlap"
    else:
        assert [bar.get_height() for bar in figure.axes[0].patches] == clients.sizes.tolist()  # pyright: ignore


def test_the_command_tells_and_draws(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """It runs twice: the first picture is kept."""
    monkeypatch.chdir(tmp_path)
    overrides = ["partition", "algorithm=fedavg", "clients=5", "partition=dirichlet", "partition.alpha=0.1", "silos=2"]
    assert [main(overrides), main(overrides)] == [0, 0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["client", "train", "validation", "test"] and len(lines[0].split()) == 14
    sizes = [int(line.split()[1]) for line in lines[1:6]]
    expected = f"clients  5; training examples: {min(sizes):,} to {max(sizes):,}, mean"
    assert lines[6].startswith(expected) and lines[7] == "picture  partition.png"
    pictures = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in pictures] == ["partition-2.png", "partition.png"]
    assert all(np.ptp(np.asarray(Image.open(path))) > 100 for path in pictures)


@pytest.mark.parametrize("wish", ["picture=partition.jpg", "picture=no/such/partition.png"])
def test_a_picture_that_cannot_be_written_is_bad_input(wish: str, capsys: pytest.CaptureFixture[str]):
    assert main(["partition", wish]) == 2
    assert wish in capsys.readouterr().err


def test_clients_with_files_of_their_own_are_described(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    """All files are read here."""
    monkeypatch.chdir(tmp_path)
    for name, city in (("a", "Rome"), ("b", "Bonn")):
        (tmp_path / f"{name}.csv").write_text("x,city,label\n" + f"1,{city},0\n2,,1\n" * 10)
    columns = ["data.columns.number=[x]", "data.columns.category=[city]"]
    assert main(["partition", "data=csv", "data.files=[a.csv,b.csv]", *columns, "silos=2", "algorithm=fedavg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in lines[1:3]] == [["17", "1", "2"]] * 2
