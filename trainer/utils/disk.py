"""Disks that cannot be written to: an error that names the disk, and what to do."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskError(OSError):
    """A disk cannot be written to; `strerror` is for the user."""


@contextmanager
def naming_disk(path: Path, lost: str = "the checkpoints are whole") -> Iterator[None]:
    """Raise DiskError for an OSError of the block by which a disk is full, read-only, or not this user's.

    Args:
        path: the file or folder that is written, which need not exist.
        lost: says what is lost with it, and what is not.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = shutil.disk_usage(next(near for near in (path, *path.absolute().parents) if near.exists())).free
            reason, remedy = f"is full ({free:,} bytes are free)", "make room, or set checkpoint.keep_last to less,"
        elif error.errno == errno.EROFS:
            reason, remedy = "is read-only", "make it writable,"
        elif error.errno in (errno.EACCES, errno.EPERM):
            reason, remedy = "does not let this user write there", "change the permissions,"
        else:
            raise
        message = f"the disk of {path} {reason}: {lost}.\n  {remedy} and resume with the same run_dir"
        raise DiskError(error.errno, message) from error
