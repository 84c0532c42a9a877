"""A file cache that ranks share, and files of installed packages."""

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


def cached_array(name: str, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> np.ndarray:
    """Return the uint8 array of the cached file `name`, memory-mapped; fill it with `fill` first if it is missing.

    One rank of a machine fills it while the others wait. The array is copy-on-write: writing to it changes no file.

    Raises:
        ValueError: the file cannot be written.
    """
    path = cache_folder() / name
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds clients' data
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, or when the process ends
            if not path.exists():
                with TemporaryDirectory(dir=path.parent) as temporary:
                    filled = Path(temporary) / name
                    array = open_memmap(filled, "w+", np.uint8, shape)
                    filled.chmod(0o600)
                    with filled.open("rb+") as file:  # to write to memory for which a full disk has no room is fatal
                        os.posix_fallocate(file.fileno(), 0, filled.stat().st_size)
                    fill(array)
                    array.flush()
                    filled.replace(path)
    except OSError as error:
        raise ValueError(
            f"cannot write the cached file {path}: {error}\n  set SILOTRAIN_CACHE to a writable folder with room for it"
        ) from error
    return np.load(path, mmap_mode="c")


def cache_folder() -> Path:
    """Return the folder of cached files, which need not exist.

    It is $SILOTRAIN_CACHE, or else silotrain/ under $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ValueError: there is no home directory.
    """
    if chosen := os.environ.get("SILOTRAIN_CACHE"):
        return Path(chosen).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "silotrain"
    except RuntimeError as error:
        raise ValueError("there is no home directory for the cache\n  set SILOTRAIN_CACHE to a folder") from error


def package_folder(package: str, install: str) -> Path:
    """Return the folder that holds an installed package, without importing it.

    Raises:
        ValueError: the package is not installed; the message has the command `install`.
    """
    try:
        return Path(str(distribution(package).locate_file("")))
    except PackageNotFoundError as error:
        raise ValueError(
            f"this data set comes with the package {package}, which is not installed.\n  {install}"
        ) from error


@contextmanager
def name_file_in_errors(path: Path, key: str = "data.path=") -> Iterator[None]:
    """Prefix the ValueErrors of the block, one problem per line, with a file, and the key that has named it."""
    try:
        yield
    except ValueError as error:
        raise ValueError("\n  ".join([f"{key}{path} cannot be used:", *str(error).split("\n")])) from error
