"""Small files, written so that a kill or a power cut leaves the old one or the new one. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOR_OWNER_ALONE = 0o077  # the permissions that are taken from new files and folders


@contextmanager
def private_files() -> Iterator[None]:
    """Give files and folders that this process makes in the block to their owner alone."""
    before = os.umask(FOR_OWNER_ALONE)
    try:
        yield
    finally:
        os.umask(before)


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_file` does. It may have names of files in it, which may hold any bytes."""
    write_file(path, text)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file aside, sync it to the disk, and rename it, so that readers see the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have on the disk what was written to a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
