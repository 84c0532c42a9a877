"""Standard output and error that never end a run: what cannot be encoded is escaped, what nobody takes is dropped.

What they get can be copied to a file, as text.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# A line that a progress bar has ended, and takes back in the same write: the cursor goes up, and the line is erased.
RETRACTED = re.compile(r"[^\n]*\n(?:\x1b\[\?25h)?\r?\x1b\[1?A\x1b\[2?K")
OVERWRITTEN = re.compile(r"[^\n]*\r(?=[^\r\n])")
# Escape sequences of ECMA-48, and single control characters other than tabs.
CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f]"
)


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


class CopiedStream:
    """A stream of which each complete line also goes to the end of a file, as a terminal shows it in the end.

    What a carriage return writes over is left out, and so are control characters. The file is made with the first line;
    what it does not take is dropped. Lines of several processes may follow each other in it.

    Args:
        stream: where the text goes.
        path: of the file.
    """

    def __init__(self, stream: Any, path: Path):
        self._stream, self._path, self._partial = stream, path, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to both."""
        *lines, self._partial = OVERWRITTEN.sub("", RETRACTED.sub("", self._partial + text)).split("\n")
        if lines:
            self._append("".join(f"{CONTROL.sub('', line)}\n" for line in lines))
        return self._stream.write(text)

    def _append(self, text: str) -> None:
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, text.encode(errors="backslashreplace"))  # at once: lines of others do not part it
            finally:
                os.close(descriptor)


@contextmanager
def copied_output(path: Path) -> Iterator[None]:
    """Copy what this process prints in the block to the end of a file too."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = CopiedStream(sys.stdout, path), CopiedStream(sys.stderr, path)  # pyright: ignore
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
