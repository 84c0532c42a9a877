"""The current activity of a worker, in memory that it shares with the killer.

The memory is a file that outlives the worker, so it shows what the worker was doing when it was killed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

NUMBER = struct.Struct("<q")
PID, STEPS, DOING, SAVING, END = 0, 8, 16, 80, 208  # where the fields begin


@dataclass(frozen=True)
class Mark:
    """The last mark of a worker.

    Attributes:
        steps: the optimizer steps since the worker was started.
        doing: the activity of its main thread, from the outside in: "combining > vectors".
        saving: the activity of its writing thread, a part of a checkpoint and the stage:
            "round-000003/replica-0: tensors".
    """

    pid: int
    steps: int
    doing: str
    saving: str


class Marks:
    """The shared memory, as the worker or a reader opens it. The file is created if it does not exist."""

    def __init__(self, path: Path):
        if not path.exists():
            path.write_bytes(bytes(END))
        with path.open("r+b") as file:
            self.memory = mmap(file.fileno(), END)
        self.outer = ""

    def read(self) -> Mark:
        """Return the current mark."""
        (pid,), (steps,) = NUMBER.unpack_from(self.memory, PID), NUMBER.unpack_from(self.memory, STEPS)
        doing, saving = (
            self.memory[start:end].rstrip(b"\0").decode() for start, end in ((DOING, SAVING), (SAVING, END))
        )
        return Mark(pid, steps, doing, saving)

    def begin(self, pid: int, doing: str) -> None:
        """Reset the marks for a new worker."""
        self.count(0)
        self.do(doing)
        self.save("")
        NUMBER.pack_into(self.memory, PID, pid)

    def count(self, steps: int) -> None:
        NUMBER.pack_into(self.memory, STEPS, steps)

    def do(self, doing: str) -> None:
        self.memory[DOING:SAVING] = _padded(doing, SAVING - DOING)

    def save(self, saving: str) -> None:
        self.memory[SAVING:END] = _padded(saving, END - SAVING)

    @contextmanager
    def inside(self, doing: str) -> Iterator[None]:
        """Mark an activity of the main thread, inside the activity before it, until the block is left."""
        before = self.outer
        self.outer = f"{before} > {doing}" if before else doing
        self.do(self.outer)
        try:
            yield
        finally:
            self.outer = before
            self.do(self.outer or "between")


def _padded(text: str, size: int) -> bytes:
    return text.encode()[:size].ljust(size, b"\0")
