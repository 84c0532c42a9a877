"""Reader of folders of images, one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import Literal
from zlib import crc32

import numpy as np
import torch

from trainer.data.readers.cache import cached_array, name_file_in_errors
from trainer.data.readers.image_decoding import Channels, Size, decode, shape_of
from trainer.data.readers.test_split import draw_test_mask, test_fraction_errors
from trainer.data.sources.base import DataSplits
from trainer.data.sources.pixels import ImageSource
from trainer.utils.errors import raise_errors

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TEST_FOLDERS = ("test", "val", "valid", "validation")

LabelledFile = tuple[Path, int]


def image_folder(
    path: str | Path,
    size: Size = None,
    channels: Channels = 3,
    cache: Literal["disk", "memory"] = "disk",
    workers: int = 4,
    test: float = 0.1,
) -> DataSplits:
    """Read images in folders named like their classes.

    The files are <path>/<class>/*.png, or <path>/train/<class>/*.png and <path>/test/<class>/*.png. Inputs are float32
    [N, C, H, W] in [0, 1], stored as uint8. Labels are indices into the sorted names of the classes.

    Args:
        path: the folder.
        size: both sides, or [height, width], to scale and crop images to; None if all have the same size.
        channels: 3 for RGB, 1 for grey.
        cache: "disk" decodes once to a memory-mapped file that the ranks of a machine and later runs share; "memory"
            decodes in every rank.
        workers: threads that decode.
        test: fraction of every class to draw as the test set, if there is no folder of test images.

    Raises:
        ValueError: lists images that cannot be read or differ in size, and classes without images or unknown in
            training.
    """
    path = Path(path).expanduser()
    with name_file_in_errors(path):
        errors = test_fraction_errors(test)
        if workers < 1:
            errors.append(f"data.workers={workers}\n  valid: a whole number from 1")
        train, test_files, names = _list_files(path, test, errors)
        images = {str(file.relative_to(path)): file for file, _ in [*train, *test_files]}
        raise_errors(errors)
        shape = (len(images), *shape_of(images, size, channels))
        fill = partial(decode, images, is_resized=size is not None, workers=workers)
        if cache == "disk":
            pixels = cached_array(_cache_name(images, shape), shape, fill)
        else:
            fill(pixels := np.empty(shape, np.uint8))
    checksum = crc32("\n".join(f"{name} {file.stat().st_size}" for name, file in images.items()).encode())
    inputs, labels = torch.from_numpy(pixels), torch.tensor([label for _, label in [*train, *test_files]])
    boundary = len(train)
    return DataSplits(
        ImageSource(inputs[:boundary], labels[:boundary], checksum=checksum),
        ImageSource(inputs[boundary:], labels[boundary:], checksum=checksum),
        len(names),
        label_names=tuple(names),
    )


def _list_files(path: Path, test: float, errors: list[str]) -> tuple[list[LabelledFile], list[LabelledFile], list[str]]:
    """Return the training and the test images with their labels, and the names of the classes."""
    if not path.is_dir():
        errors.append(f"there is no folder {path.absolute()}")
        return [], [], []
    test_folder = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    if not (path / "train").is_dir() or test_folder is None:
        names = _class_names(path)
        files = _label_files(path, names, errors)
        labels = np.array([label for _, label in files], np.int64)
        mask = draw_test_mask(len(files), test, labels) if not errors else np.zeros(len(files), bool)
        return list(compress(files, ~mask)), list(compress(files, mask)), names
    names = _class_names(path / "train")
    if unknown := sorted(set(_class_names(test_folder)) - set(names)):
        errors.append(f"{test_folder.name}/ has classes that train/ lacks: {', '.join(unknown)}")
    tested = [name for name in names if (test_folder / name).is_dir()]
    test_files = [(file, names.index(tested[label])) for file, label in _label_files(test_folder, tested, errors)]
    return _label_files(path / "train", names, errors), test_files, names


def _class_names(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _label_files(path: Path, names: Sequence[str], errors: list[str]) -> list[LabelledFile]:
    """Return the images below the folders of these names, sorted, with the index of their folder."""
    if not names:
        errors.append(f"{path}: no folders; images must be in folders named like their classes")
    labelled: list[LabelledFile] = []
    for label, name in enumerate(names):
        files = sorted(file for file in (path / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            errors.append(f"{path / name}: no images ({', '.join(sorted(SUFFIXES))})")
        labelled += [(file, label) for file in files]
    return labelled


def _cache_name(images: dict[str, Path], shape: tuple[int, ...]) -> str:
    """Return the name of the cached file, which changes with any image's path, size or modification time."""
    digest = blake2b(str(shape).encode(), digest_size=12)
    for name, file in images.items():
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return f"images-v1-{digest.hexdigest()}.npy"
