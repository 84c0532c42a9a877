"""Files that data sets are made from: a cache that ranks may race for, and data inside installed packages."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.lib.format import open_memmap
from safetensors.torch import load_file, save
from torch import Tensor


def cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the cached file `name`, made and written first where it is missing.

    The file lies in $SILOTRAIN_CACHE, or else in silotrain/ under $XDG_CACHE_HOME or ~/.cache. It is written aside and
    renamed: a rank that comes in between makes its own, and every rank reads a whole file.
    """
    path = cache_folder() / name
    if not path.exists():
        _write(path, save(make()))
    return load_file(path)


def cached_array(name: str, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> np.ndarray:
    """The uint8 array of the cached file `name`, memory-mapped, first filled by `fill` where there is none.

    Of the ranks of a machine one fills it while the others wait. Writing to what is returned changes no file.
    """
    path = cache_folder() / name
    with _write_atomically(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # it is let go with the file, or with the process
            if not path.exists():
                with TemporaryDirectory(dir=path.parent) as aside:
                    array = open_memmap(Path(aside) / name, "w+", np.uint8, shape)
                    fill(array)
                    array.flush()
                    (Path(aside) / name).replace(path)
    return np.load(path, mmap_mode="c")


def cache_folder() -> Path:
    """The folder of cached files; it need not exist."""
    if chosen := os.environ.get("SILOTRAIN_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "silotrain"


def package_folder(package: str, install: str) -> Path:
    """The folder that holds an installed package's files, found without importing it.

    Raises ValueError with the command `install` when the package is not there.
    """
    try:
        return Path(str(distribution(package).locate_file("")))
    except PackageNotFoundError as error:
        raise ValueError(
            f"this data set comes with the package {package}, which is not installed.\n  {install}"
        ) from error


@contextmanager
def naming_file_in_errors(path: Path) -> Iterator[None]:
    """What is found wrong in the block, a fault a line, is said as what is wrong with the file `data.path`."""
    try:
        yield
    except ValueError as error:
        raise ValueError("\n  ".join([f"data.path={path} cannot be used:", *str(error).split("\n")])) from error


def _write(path: Path, content: bytes) -> None:
    with _write_atomically(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as aside, (Path(aside) / path.name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)


@contextmanager
def _write_atomically(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write the cached file {path}: {error}\n  set SILOTRAIN_CACHE to a folder that can be written"
        ) from error
