"""Standard output and error that never end a run: what cannot be encoded is escaped, what nobody takes is dropped."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class LossyFile(io.FileIO):
    """A descriptor, on which what cannot be written is dropped: its reader has left, or its disk is full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def keep_output_harmless() -> None:
    """Replace sys.stdout and sys.stderr by streams that raise no error."""
    sys.stdout, sys.stderr = (_lossy(stream) for stream in (sys.stdout, sys.stderr))


def _lossy(stream: Any) -> Any:
    if stream is None:  # its descriptor was closed before this process began
        return open(os.devnull, "w", errors="replace")
    try:
        file = LossyFile(stream.fileno(), "w", closefd=False)
    except io.UnsupportedOperation:  # another program has put a stream of its own in this place
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
