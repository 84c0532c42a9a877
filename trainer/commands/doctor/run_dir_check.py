"""Check that the run folder can be written, and is the same on all nodes.

Nothing is left there.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.shared_storage import visible_nodes


class RunDirView(NamedTuple):
    """A node's view of the run folder: is it that of rank 0, and can it be written?

    `error` tells why it cannot be written; it is empty if it can.
    """

    is_same: bool
    error: str


@contextmanager
def marker_file(folder: Path) -> Iterator[str]:
    """Create a file beside the folder, yield its name, and remove it at the end.

    The name is empty if the file cannot be created.
    """
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    marker = folder.absolute().parent / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        name = marker.name
    except OSError:
        name = ""
    try:
        yield name
    finally:
        with suppress(OSError):  # it could not be created
            marker.unlink()
        for parent in missing:
            with suppress(OSError):  # it could not be created, or others have written there meanwhile
                parent.rmdir()


def inspect_run_dir(folder: Path, marker: str) -> RunDirView:
    """Return this node's view of the folder, beside which rank 0 has left a marker."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    error_text = ""
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        error_text = f"{existing}: {error.strerror}"
    is_same = bool(marker and visible_nodes({0: folder.absolute().parent / marker}))
    return RunDirView(is_same, error_text)
