"""Direct I/O: files written past the page cache, because filling it costs ten times the processor time of the rest.

A checkpoint is written by a thread beside the training, which needs every core. So the time that it takes matters less
than the processor time. Direct I/O goes from aligned memory to the disk.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import zlib
from pathlib import Path
from types import TracebackType

BLOCK_BYTES = 4 << 20
ALIGNMENT = 4096  # of memory, offsets and lengths: enough for every common disk

DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class DirectFile:
    """A new file for its owner alone, which is on the disk when its `with` block has ended.

    File systems without direct I/O, such as tmpfs, are written to as usual.

    Attributes:
        size: bytes written so far.
        crc32: their checksum.
    """

    def __init__(self, path: Path):
        self.size = self.crc32 = 0
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # memory that begins at a page
        self._filled = 0
        self._descriptor = _open(path)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            if kind is None:
                self._flush(self._filled // ALIGNMENT * ALIGNMENT)
                _disable_direct_io(self._descriptor)  # the rest has no aligned length
                self._flush(self._filled)
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes to the file."""
        while len(content):
            taken = min(len(content), BLOCK_BYTES - self._filled)
            self._block[self._filled : self._filled + taken] = content[:taken]
            self.crc32 = zlib.crc32(content[:taken], self.crc32)
            self.size += taken
            self._filled += taken
            content = content[taken:]
            if self._filled == BLOCK_BYTES:
                self._flush(BLOCK_BYTES)

    def _flush(self, count: int) -> None:
        """Write the first bytes of the block, and move the others to its start."""
        with memoryview(self._block) as block:
            done = 0
            while done < count:  # a disk that is nearly full takes a part, and refuses the rest
                done += self._write_out(block[done:count])
        self._filled -= count
        if count and self._filled:
            self._block.move(0, count, self._filled)

    def _write_out(self, aligned: memoryview) -> int:
        try:
            return os.write(self._descriptor, aligned)
        except OSError as error:
            if error.errno != errno.EINVAL or not _disable_direct_io(self._descriptor):
                raise
            return os.write(self._descriptor, aligned)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o600)


def _disable_direct_io(descriptor: int) -> bool:
    """Write through the page cache from now on; return whether that is a change."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
    return bool(flags & DIRECT)
