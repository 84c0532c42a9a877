"""CIFAR-10's binary files, written record by record as their page describes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data import cifar10

NAMES = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]


def record(label: int, red: int, green: int, blue: int) -> bytes:
    """Return an image of one colour whose first pixel is black."""
    planes = (struct.pack("1024B", 0, *[level] * 1023) for level in (red, green, blue))
    return struct.pack("B", label) + b"".join(planes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(record(number, 10 * number, 20, 30) + record(9, 255, 0, 51))
    return tmp_path


def refusal(root: Path) -> str:
    with pytest.raises(ValueError, match=r"data\.root=") as error:
        cifar10(root)
    return str(error.value)


def test_examples_are_those_of_the_files_in_order(root: Path) -> None:
    splits = cifar10(root)
    assert (len(splits.train), len(splits.test), splits.classes, splits.label_names[9]) == (10, 2, 10, "truck")
    inputs, targets = splits.train.fetch(torch.tensor([8, 1]))
    assert inputs.shape == (2, 3, 32, 32) and inputs.dtype == torch.float32 and targets.tolist() == [4, 9]
    assert torch.equal(inputs[:, :, 0, 0], torch.zeros(2, 3))
    assert torch.allclose(inputs[:, :, 31, 31], torch.tensor([[40.0, 20, 30], [255, 0, 51]]) / 255)
    assert splits.train.labels is not None and splits.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]


def test_an_image_takes_3072_bytes_of_memory(root: Path) -> None:
    images, _ = cifar10(root).train.fingerprint_data()  # type: ignore[attr-defined]
    assert images.dtype == np.uint8 and images.nbytes == 10 * 3072


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda content: content[:-1], "data_batch_3.bin: 6145 bytes are not a multiple of the record size 3073"),
        (lambda content: b"", "data_batch_3.bin: 0 bytes are not a multiple"),
        (
            lambda content: content[:3073] + b"\x0a" + content[3074:],
            "data_batch_3.bin: label 10 of example 1 is outside",
        ),
        (None, "data_batch_3.bin: No such file"),
    ],
)
def test_damaged_files(root: Path, corrupt: Any, message: str) -> None:
    path = root / "data_batch_3.bin"
    content = path.read_bytes()
    path.unlink()
    if corrupt:
        path.write_bytes(corrupt(content))
    text = refusal(root)
    assert f"CIFAR-10 cannot be read from data.root={root}:\n  {message}" in text and "set data.root=" in text


def test_all_errors_are_reported_at_once(root: Path) -> None:
    (root / NAMES[0]).unlink()
    (root / NAMES[5]).write_bytes(b"<html>not found")
    text = refusal(root)
    assert "data_batch_1.bin: No such file" in text and "test_batch.bin: 15 bytes" in text


def test_a_missing_folder() -> None:
    assert "data.root=nowhere: there is no folder /" in refusal(Path("nowhere"))
