"""Folders of images, one folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal
from zlib import crc32

import numpy as np
import torch

from trainer.data.readers.cache import cached_array, naming_file_in_errors
from trainer.data.readers.image_decoding import Channels, Size, decode, shape_of
from trainer.data.readers.test_split import test_fraction_errors, test_mask
from trainer.data.sources.base import DataSplits
from trainer.data.sources.pixels import ImageSource

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TEST_FOLDERS = ("test", "val", "valid", "validation")

Labelled = tuple[Path, int]


def image_folder(
    path: str | Path,
    size: Size = None,
    channels: Channels = 3,
    cache: Literal["disk", "memory"] = "disk",
    workers: int = 4,
    test: float = 0.1,
) -> DataSplits:
    """Images in folders that are called as their classes: <path>/<class>/*.png, or <path>/train/... and <path>/test/...

    Inputs float32 [N, C, H, W] in [0, 1]; labels are the places of the sorted names of the classes. Without a folder
    train, the fraction `test` of every class is the test set, drawn. All images are decoded here, by `workers` threads,
    into a byte a pixel and channel: in a memory-mapped file of the cache folder, which the ranks of a machine and later
    runs share, or in the memory of each rank. `size` scales and crops them. Raises one ValueError with all that is
    wrong: images that cannot be read or differ in size, classes without images or unknown in training.
    """
    path = Path(path).expanduser()
    with naming_file_in_errors(path):
        errors = [*test_fraction_errors(test), *([f"data.workers={workers}: at least 1"] if workers < 1 else [])]
        train, known, names = _listed(path, test, errors)
        images = {str(file.relative_to(path)): file for file, _ in [*train, *known]}
        if errors:
            raise ValueError("\n".join(errors))
        shape = (len(images), *shape_of(images, size, channels))
        pixels = np.empty(shape, np.uint8) if cache == "memory" else None
        if pixels is None:
            pixels = cached_array(
                _name(images, shape), shape, lambda into: decode(images, into, size is not None, workers)
            )
        else:
            decode(images, pixels, size is not None, workers)
    told = crc32("\n".join(f"{name} {file.stat().st_size}" for name, file in images.items()).encode())
    every, labels = torch.from_numpy(pixels), torch.tensor([label for _, label in [*train, *known]])
    cut = len(train)
    return DataSplits(
        ImageSource(every[:cut], labels[:cut], checksum=told),
        ImageSource(every[cut:], labels[cut:], checksum=told),
        len(names),
        label_names=tuple(names),
    )


def _listed(path: Path, test: float, errors: list[str]) -> tuple[list[Labelled], list[Labelled], list[str]]:
    """The images to train on and to test with, with their labels, and the names of the classes."""
    if not path.is_dir():
        errors.append(f"there is no folder {path.absolute()}")
        return [], [], []
    held_folder = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    if not (path / "train").is_dir() or held_folder is None:
        names = _classes(path)
        files = _labelled(path, names, errors)
        labels = np.array([label for _, label in files], np.int64)
        held = test_mask(len(files), test, labels) if not errors else np.zeros(len(files), bool)
        train, known = ([file for file, is_held in zip(files, held, strict=True) if is_held == part] for part in (0, 1))
        return train, known, names
    names = _classes(path / "train")
    if strangers := sorted(set(_classes(held_folder)) - set(names)):
        errors.append(f"{held_folder.name}/ has classes that train/ has not: {', '.join(strangers)}")
    there = [name for name in names if (held_folder / name).is_dir()]
    known = [(file, names.index(there[label])) for file, label in _labelled(held_folder, there, errors)]
    return _labelled(path / "train", names, errors), known, names


def _classes(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _labelled(path: Path, names: Sequence[str], errors: list[str]) -> list[Labelled]:
    """The images under the folders of these names, sorted."""
    if not names:
        errors.append(f"{path}: no folders, which are called as the classes of the images in them")
    found: list[Labelled] = []
    for label, name in enumerate(names):
        files = sorted(file for file in (path / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            errors.append(f"{path / name}: no images ({', '.join(sorted(SUFFIXES))})")
        found += [(file, label) for file in files]
    return found


def _name(images: dict[str, Path], shape: tuple[int, ...]) -> str:
    """The cached file's: another one when an image has changed, or its place."""
    digest = blake2b(str(shape).encode(), digest_size=12)
    for name, file in images.items():
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return f"images-v1-{digest.hexdigest()}.npy"
