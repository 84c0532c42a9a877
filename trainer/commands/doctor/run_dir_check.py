"""Whether a run could write its folder, and whether all nodes see the same one. Nothing is left there."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

VISIBILITY_TIMEOUT_SECONDS = 1  # for a file that another node has written


class RunDirView(NamedTuple):
    """A node's view of the run folder: whether it is that of rank 0, and why it cannot be written, if it cannot."""

    is_same: bool
    error: str


@contextmanager
def marker_file(folder: Path) -> Iterator[str]:
    """The name of a file that lies beside this folder until the block is left; empty if it cannot be made."""
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    mark = folder.absolute().parent / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        made = mark.name
    except OSError:
        made = ""
    try:
        yield made
    finally:
        mark.unlink(missing_ok=True) if made else None
        for parent in missing:
            with suppress(OSError):  # it was not made, or others have written there meanwhile
                parent.rmdir()


def inspect_run_dir(folder: Path, mark: str) -> RunDirView:
    """What this node sees of the folder beside which rank 0 has left the mark."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    fault = ""
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        fault = f"{there}: {error.strerror}"
    deadline = time.monotonic() + VISIBILITY_TIMEOUT_SECONDS
    found = False
    while mark and not (found := (folder.absolute().parent / mark).exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return RunDirView(found, fault)
