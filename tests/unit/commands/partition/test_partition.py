"""The picture of a partition: a dot for each client and label, its area the number of examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.commands.main import main
from trainer.commands.partition.plot import INK, MAX_DOT, draw
from trainer.data import Iid, Shards, TensorSource

ROW = MAX_DOT + 2


def labelled(examples: int, classes: int) -> TensorSource:
    return TensorSource(torch.zeros(examples, 1), torch.arange(examples) % classes)


def inked(image: Image.Image) -> np.ndarray:
    """Return which pixels [rows, columns] belong to dots or bars."""
    return (np.asarray(image) == INK).all(2)


def test_areas_are_numbers_of_examples():
    source = labelled(600, 3)
    clients = Shards(per_client=1).split(source, source, 3, 0)
    image = draw(clients, source.labels, ("a", "b", "c"))
    ink = inked(image)
    area = np.pi * (MAX_DOT / 2) ** 2
    assert ink.sum() == pytest.approx(3 * area, rel=0.1)
    per_row = [ink[10 + ROW * label : 10 + ROW * (label + 1)].sum() for label in range(3)]
    assert per_row == [pytest.approx(area, rel=0.1)] * 3


@pytest.mark.parametrize("classes", [30, 1])
def test_many_clients_and_many_labels_fit(classes: int):
    source = labelled(4000, classes)
    clients = Iid().split(source, source, 1000, 0)
    image = draw(clients, source.labels)
    assert image.width < 4200 and inked(image).any()
    assert inked(draw(clients, None)).any()


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
    assert all(inked(Image.open(path)).any() for path in pictures)


@pytest.mark.parametrize("wish", ["picture=partition.jpg", "picture=no/such/partition.png"])
def test_a_picture_that_cannot_be_written_is_bad_input(wish: str, capsys: pytest.CaptureFixture[str]):
    assert main(["partition", wish]) == 2
    assert wish in capsys.readouterr().err
