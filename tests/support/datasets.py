"""A few examples for each data set of conf/data, as the files that a user would bring."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

GENERATOR = np.random.default_rng(0)
LANGUAGE_MODEL = ["model.width=16", "model.layers=1", "model.heads=2"]


def idx_bytes(array: np.ndarray) -> bytes:
    """The array as an IDX file of bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx(folder: Path) -> list[str]:
    """MNIST's four files, with 20 and 10 images."""
    for part, examples in (("train", 20), ("t10k", 10)):
        images = GENERATOR.integers(0, 256, (examples, 28, 28))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(examples) % 10))
    return [f"data.root={folder}", "model=mlp", "model.hidden=8"]


def text(folder: Path) -> list[str]:
    """A text, of which a window is 16 bytes."""
    (folder / "hamlet.txt").write_text("To be, or not to be, that is the question:\n" * 20)
    return [f"data.path={folder / 'hamlet.txt'}", "data.length=16", *LANGUAGE_MODEL]


def npz(folder: Path) -> list[str]:
    """Clouds of points."""
    np.savez(folder / "points.npz", x=GENERATOR.normal(size=(40, 5)), y=np.arange(40) % 3)
    return [f"data.path={folder / 'points.npz'}", "model=mlp", "model.inputs=5", "model.classes=3"]


def custom(folder: Path) -> list[str]:
    """A function that gives Splits: here, one of ours."""
    path, *model = npz(folder)
    return ["data._target_=trainer.data.npz", f"+{path}", *model]


# By the names of the files in conf/data: what writes the files into a folder, and the overrides with which it is run.
FILES: dict[str, Callable[[Path], list[str]]] = {
    "custom": custom,
    "digits": lambda folder: [],
    "fashion_mnist": idx,
    "mnist": idx,
    "npz": npz,
    "shakespeare": lambda folder: ["data.length=2000", *LANGUAGE_MODEL],
    "text": text,
}
