"""Reader of folders of images, one folder per class."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import Literal
from unicodedata import normalize
from zlib import crc32

import numpy as np
import torch

from trainer.data.readers.cache import cached_array, name_file_in_errors
from trainer.data.readers.image_decoding import Channels, Size, decode, shape_of
from trainer.data.readers.limits import check_unpacked_size
from trainer.data.readers.test_split import draw_test_mask, test_fraction_errors
from trainer.data.sources.base import DataSplits
from trainer.data.sources.pixels import ImageSource
from trainer.utils.errors import raise_errors

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

# Names of folders of training, test and validation images: train, Training, training_set, seg_train, images-test.
_WORDS = "(?:data|dataset|images?|imgs?|seg|set|split)"
SPLIT_NAMES = [
    re.compile(rf"(?:{_WORDS}[-_ ]?)?(?:{names})(?:[-_ ]?{_WORDS})?[-_ ]?\d*")
    for names in ("train|training", "test|testing", "val|valid|validation|eval|evaluation|dev")
]

DECODING_THREADS = 4

LabelledFile = tuple[Path, int]


def image_folder(
    path: str | Path,
    size: Size = None,
    channels: Channels = 3,
    cache: Literal["disk", "memory"] = "disk",
    threads: int = 4,
    test: float = 0.1,
) -> DataSplits:
    """Read images in folders named like their classes.

    The files are <path>/<class>/*.png, or <path>/train/<class>/*.png, <path>/test/<class>/*.png and perhaps
    <path>/val/<class>/*.png, where `Training`, `training_set` and the like are names of train/. Without test/ the
    images of validation are the test set. Hidden files are skipped. Inputs are float32 [N, C, H, W] in [0, 1], stored
    as uint8. Images are turned as EXIF tells, and grey ones of 16 bits are divided by 256. Labels are indices into the
    sorted names of the classes.

    Args:
        path: the folder.
        size: both sides, or [height, width], to scale and crop images to; None if all have the same size.
        channels: 3 for RGB, 1 for grey.
        cache: "disk" decodes once to a memory-mapped file that the ranks of a machine and later runs share; "memory"
            decodes in every rank.
        threads: number of threads that decode.
        test: fraction of every class to draw as the test set, if there is no folder of test images.

    Raises:
        ValueError: lists images that cannot be read or differ in size, and classes without images or unknown in
            training.
    """
    path = Path(path).expanduser()
    with name_file_in_errors(path):
        errors = test_fraction_errors(test)
        if threads < 1:
            errors.append(f"data.threads={threads}\n  valid: a whole number from 1")
        parts, names = _list_files(path, test, errors)
        files = [file for part in parts.values() for file in part]
        images = {str(file.relative_to(path)): file for file, _ in files}
        raise_errors(errors)
        shape = (len(images), *shape_of(images, size, channels))
        fill = partial(decode, images, is_resized=size is not None, threads=threads)
        if cache == "disk":
            pixels = cached_array(cache_name(images, shape), shape, fill)
        else:
            check_unpacked_size("images", math.prod(shape))
            fill(pixels := np.empty(shape, np.uint8))
    checksum = crc32("\n".join(f"{name} {file.stat().st_size}" for name, file in images.items()).encode())
    sizes = [len(part) for part in parts.values()]
    inputs, labels = torch.from_numpy(pixels).split(sizes), torch.tensor([label for _, label in files]).split(sizes)
    sources = {
        part: ImageSource(some, labels_of, checksum=checksum)
        for part, some, labels_of in zip(parts, inputs, labels, strict=True)
    }
    splits = DataSplits(sources["train"], sources["test"], len(names), label_names=tuple(names))
    return splits.with_parts(**sources)


def read_images(files: Sequence[Path], size: Size = None, channels: Channels = 3) -> ImageSource:
    """Read images without labels into memory; the targets of the source are zeros.

    Args:
        files: the images.
        size: as for `image_folder`.
        channels: likewise.

    Raises:
        ValueError: lists images that cannot be read or differ in size.
    """
    images = {str(file): file for file in files}
    shape = (len(images), *shape_of(images, size, channels))
    check_unpacked_size("images", math.prod(shape))
    decode(images, pixels := np.empty(shape, np.uint8), size is not None, DECODING_THREADS)
    return ImageSource(torch.from_numpy(pixels), torch.zeros(len(images), dtype=torch.int64))


def _list_files(path: Path, test: float, errors: list[str]) -> tuple[dict[str, list[LabelledFile]], list[str]]:
    """Return the images with their labels of `train`, `test` and perhaps `validation`, and the names of the classes."""
    if not path.is_dir():
        errors.append(f"there is no folder {path.absolute()}")
        return {}, []
    train_folder, *held_out = _split_folders(path, errors)
    classes = _class_folders(train_folder)
    names = list(classes)
    files = _label_files(train_folder, classes, names, errors)
    if not held_out:
        labels = np.array([label for _, label in files], np.int64)
        mask = draw_test_mask(len(files), test, labels) if not errors else np.zeros(len(files), bool)
        return {"train": list(compress(files, ~mask)), "test": list(compress(files, mask))}, names
    parts = {"train": files}
    for part, folder in zip(("test", "validation"), held_out, strict=False):
        found = _class_folders(folder)
        if unknown := sorted(found.keys() - classes.keys()):
            errors.append(f"{folder.name}/ has classes that {train_folder.name}/ lacks: {', '.join(unknown)}")
            found = {name: folders for name, folders in found.items() if name in classes}
        parts[part] = _label_files(folder, found, names, errors)
    return parts, names


def _split_folders(path: Path, errors: list[str]) -> list[Path]:
    """Return the folders that hold those of the classes: of training, and of testing and validation if there are any.

    Folders of a class each, in `path` itself or in a training folder alone, are both.
    """
    path = _enter(path)
    folders = _visible_folders(path)
    train, test, validation = (
        [folder for folder in folders if pattern.fullmatch(folder.name.casefold())] for pattern in SPLIT_NAMES
    )
    if train and (test or validation):
        parts = [part for part in (train, test, validation) if part]
        if any(len(part) > 1 for part in parts):
            found = ", ".join(f"{folder.name}/" for part in parts for folder in part)
            errors.append(f"{path}: {found}: there must be one folder of training, of test and of validation images")
        return [_enter(part[0]) for part in parts]
    if folders and len(train) == len(folders) == 1:
        return [_enter(train[0])]
    if folders and len(test) + len(validation) == len(folders):
        names = ", ".join(f"{folder.name}/" for folder in folders)
        errors.append(f"{path}: {names} without train/. Set data.path= to the folder of both, or rename one to train/")
    return [path]


def _enter(path: Path) -> Path:
    """Return the folder, or the one inside it that is all it holds, as archives unpack, if that one holds folders."""
    inner = _visible_folders(path)
    while len(inner) == 1 and not _holds_images(path) and _visible_folders(inner[0]) and not _holds_images(inner[0]):
        path, inner = inner[0], _visible_folders(inner[0])
    return path


def _visible_folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not _is_hidden(folder.name))


def _holds_images(path: Path) -> bool:
    return any(file.suffix.lower() in SUFFIXES and not _is_hidden(file.name) for file in path.iterdir())


def _is_hidden(name: str) -> bool:
    """Return whether a file or folder is none of the user's: notebooks and macOS leave copies and metadata."""
    return name.startswith(".") or name == "__MACOSX"


def _class_folders(path: Path) -> dict[str, list[Path]]:
    """Return the folders of each class, sorted by name.

    Names are compared in the composed form of Unicode: macOS decomposes letters such as é, so that a copied folder
    may be there in both spellings.
    """
    folders: dict[str, list[Path]] = {}
    for folder in _visible_folders(path):
        folders.setdefault(normalize("NFC", folder.name), []).append(folder)
    return dict(sorted(folders.items()))


def _label_files(
    path: Path, classes: dict[str, list[Path]], names: Sequence[str], errors: list[str]
) -> list[LabelledFile]:
    """Return the images below the folders of each class, sorted, with the index of the class among the names."""
    if not classes:
        errors.append(f"{path}: no folders; images must be in folders named like their classes")
    labelled: list[LabelledFile] = []
    for name, folders in classes.items():
        files = [file for folder in folders for file in sorted(images_below(folder))]
        if not files:
            errors.append(f"{folders[0]}: no images ({', '.join(sorted(SUFFIXES))})")
        labelled += [(file, names.index(name)) for file in files]
    return labelled


def images_below(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder, at any depth."""
    for file in folder.rglob("*"):
        if file.suffix.lower() in SUFFIXES and not any(map(_is_hidden, file.relative_to(folder).parts)):
            yield file


def cache_name(images: dict[str, Path], shape: tuple[int, ...]) -> str:
    """Return the name of the cached file, which changes with any image's path, size or modification time."""
    digest = blake2b(str(shape).encode(), digest_size=12)
    for name, file in images.items():
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return f"images-v2-{digest.hexdigest()}.npy"
