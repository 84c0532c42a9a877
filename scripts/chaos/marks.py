"""The activity of a worker at this very moment, in memory that it shares with whoever wants to kill it.

The memory is a file, so it outlives the worker: what stands there afterwards is what the kill hit.
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

    steps   optimizer steps since it was started
    doing   its main thread, from the outside in: "combining > vectors"
    saving  its writing thread: the part of a checkpoint, and the stage: "round-000003/replica-0: tensors"
    """

    pid: int
    steps: int
    doing: str
    saving: str


class Marks:
    """A worker's side of the memory, or a reader's. The file is made if there is none."""

    def __init__(self, path: Path):
        if not path.exists():
            path.write_bytes(bytes(END))
        with path.open("r+b") as file:
            self.memory = mmap(file.fileno(), END)
        self.outer = ""

    def read(self) -> Mark:
        """Return the mark that is there now."""
        (pid,), (steps,) = NUMBER.unpack_from(self.memory, PID), NUMBER.unpack_from(self.memory, STEPS)
        doing, saving = (
            self.memory[start:end].rstrip(b"\0").decode() for start, end in ((DOING, SAVING), (SAVING, END))
        )
        return Mark(pid, steps, doing, saving)

    def begin(self, pid: int, doing: str) -> None:
        """Another worker has taken the place of the last one."""
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
        """While the block lasts, the main thread does this, as a part of what it did before."""
        before = self.outer
        self.outer = f"{before} > {doing}" if before else doing
        self.do(self.outer)
        try:
            yield
        finally:
            self.outer = before
            self.do(self.outer or "between")

    def _text(self, start: int, end: int) -> str:
        return self.memory[start:end].rstrip(b"\0").decode()


def _padded(text: str, size: int) -> bytes:
    return text.encode()[:size].ljust(size, b"\0")
