"""Small files of examples for each data set of conf/data."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
from datasets import Dataset
from PIL import Image

from tests.support.tokenizers import CHATML, save_tokenizer

GENERATOR = np.random.default_rng(0)
LANGUAGE_MODEL = ["model.width=16", "model.layers=1", "model.heads=2"]


def idx_bytes(array: np.ndarray) -> bytes:
    """Return an array as an IDX file of bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx(folder: Path) -> list[str]:
    """Write MNIST's four files, with 20 and 10 images."""
    for part, examples in (("train", 20), ("t10k", 10)):
        images = GENERATOR.integers(0, 256, (examples, 28, 28))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(examples) % 10))
    return [f"data.root={folder}", "model=mlp", "model.hidden=8"]


def cifar10(folder: Path) -> list[str]:
    """Write CIFAR-10's six files, with 4 images each."""
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        records = GENERATOR.integers(0, 256, (4, 3073), np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)
    return [f"data.root={folder}", "model=mlp", "model.inputs=3072", "model.hidden=8"]


def images(folder: Path) -> list[str]:
    """Write grey images of 8 x 8 in two classes."""
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(8):
            pixels = GENERATOR.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return [f"data.path={folder}", "data.channels=1", "data.test=0.25", "model.classes=2"]


def parquet(folder: Path) -> list[str]:
    """Write points, with their coordinates in two columns."""
    x, y = GENERATOR.normal(size=(2, 40))
    pyarrow.parquet.write_table(pyarrow.table({"x": x, "y": y, "label": np.arange(40) % 3}), folder / "points.parquet")
    return [f"data.path={folder / 'points.parquet'}", "model=mlp", "model.inputs=2", "model.classes=3"]


def csv_points(folder: Path) -> list[str]:
    """The same in CSV."""
    with open(folder / "points.csv", "w", newline="") as file:
        csv.writer(file).writerows([("x", "y", "label"), *((*GENERATOR.normal(size=2), i % 3) for i in range(40))])
    return [f"data.path={folder / 'points.csv'}", "model=mlp", "model.inputs=2", "model.classes=3"]


def jsonl_points(folder: Path) -> list[str]:
    """The same in JSON lines, with the coordinates in a list."""
    rows = [{"point": GENERATOR.normal(size=2).tolist(), "label": i % 3} for i in range(40)]
    (folder / "points.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [f"data.path={folder / 'points.jsonl'}", "model=mlp", "model.inputs=2", "model.classes=3"]


def datasets(folder: Path) -> list[str]:
    """Write points as a Dataset saved to disk."""
    points = {"point": GENERATOR.normal(size=(40, 2)).tolist(), "label": (np.arange(40) % 3).tolist()}
    Dataset.from_dict(points).save_to_disk(folder / "points")
    return [f"data.path={folder / 'points'}", "model=mlp", "model.inputs=2", "model.classes=3"]


def text(folder: Path) -> list[str]:
    """Write a text, for windows of 16 bytes."""
    (folder / "hamlet.txt").write_text("To be, or not to be, that is the question:\n" * 20)
    return [f"data.path={folder / 'hamlet.txt'}", "data.length=16", *LANGUAGE_MODEL]


def npz(folder: Path) -> list[str]:
    """Write points as arrays."""
    np.savez(folder / "points.npz", x=GENERATOR.normal(size=(40, 5)), y=np.arange(40) % 3)
    return [f"data.path={folder / 'points.npz'}", "model=mlp", "model.inputs=5", "model.classes=3"]


def tokens(folder: Path) -> list[str]:
    """Write tokens of a vocabulary of 300."""
    GENERATOR.integers(0, 300, 700).astype("<u2").tofile(folder / "tokens.bin")
    return [f"data.path={folder / 'tokens.bin'}", "data.vocabulary=300", "data.length=16", *LANGUAGE_MODEL]


def custom(folder: Path) -> list[str]:
    """A function that returns DataSplits."""
    path, *model = npz(folder)
    return ["data._target_=trainer.data.npz", f"+{path}", *model]


# By file name in conf/data: a function that writes examples into a folder, and returns the overrides to use them.
def chat(folder: Path) -> list[str]:
    """Write questions and answers, and a tokenizer with a template."""
    lines = [{"prompt": "why?", "response": "the quick brown fox " * (number % 3 + 1)} for number in range(60)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = save_tokenizer(folder / "tokenizer", CHATML)
    return [
        f"data.path={folder / 'chat.jsonl'}",
        f"data.tokenizer={tokenizer}",
        "model.vocabulary=320",
        *LANGUAGE_MODEL,
    ]


FILES: dict[str, Callable[[Path], list[str]]] = {
    "chat": chat,
    "cifar10": cifar10,
    "csv": csv_points,
    "custom": custom,
    "datasets": datasets,
    "digits": lambda folder: [],
    "fashion_mnist": idx,
    "images": images,
    "jsonl": jsonl_points,
    "mnist": idx,
    "npz": npz,
    "parquet": parquet,
    "shakespeare": lambda folder: ["data.length=500", "data.test=0.01", "data.validation=0", *LANGUAGE_MODEL],
    "text": text,
    "tokens": tokens,
}
