"""A run under way, seen from outside: its workers, what they do, how far it has come on disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scripts.chaos import worker
from scripts.chaos.marks import Mark, Marks
from trainer.checkpoint.format import find_saved
from trainer.checkpoint.resume import round_folders

POLL_INTERVAL_SECONDS = 0.001
SECONDS_TO_END = 20


class Watched:
    """A run and its workers.

    marks          what each rank does
    born           when each process was first seen, by its id
    start_seconds  from the launch to the first step of all ranks; None until then, and when a kill came before
    recoveries     seconds from a kill to the next step of all ranks, of kills after which there was one
    """

    def __init__(self, tree: dict[str, Any], folder: Path, nproc: int):
        self.folder, self.said = folder, folder.with_suffix(".txt")
        marks = folder.with_suffix(".marks")
        marks.mkdir(parents=True)
        self.marks = [Marks(marks / str(rank)) for rank in range(nproc)]
        # Forked, because importing torch anew takes seconds.
        self.launcher = multiprocessing.get_context("fork").Process(target=worker.start, args=(tree, marks, self.said))
        self.launcher.start()
        self.began = time.monotonic()
        self.born: dict[int, float] = {}
        self.start_seconds: float | None = None
        self.recoveries: list[float] = []
        self._dead: set[int] = set()
        self._since: float | None = self.began
        self._ranks: dict[int, int] = {}

    def workers(self) -> dict[int, int]:
        """The processes of the last start that is known to have begun, by rank."""
        return {rank: pid for pid in self._children() if (rank := self._rank(pid)) is not None}

    def mark(self, rank: int, pid: int) -> Mark:
        """Return the activity of a worker; one without a mark is starting Python."""
        mark = self.marks[rank].read()
        return mark if mark.pid == pid else Mark(pid, 0, "starting Python", "")

    def wait(self, condition: Callable[[], bool], pause: float = POLL_INTERVAL_SECONDS) -> bool:
        """Returns True when it holds, False when the run has ended."""
        while self.launcher.is_alive():
            self._look()
            if condition():
                return True
            time.sleep(pause)
        return False

    def wait_for_start(self) -> bool:
        """Returns when none of the workers is one that saw a kill; False when the run has ended."""
        return self.wait(lambda: len(now := self.workers()) == len(self.marks) and not self._dead & set(now.values()))

    def kill(self, rank: int) -> tuple[int, Mark] | None:
        """Kills a worker: its process id, and what it did then. None when it has ended by itself."""
        workers = self.workers()
        pid = workers.get(rank)
        if pid is None or not _is_running(pid):
            return None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self._since, self._dead = time.monotonic(), self._dead | set(workers.values())
        self.wait(lambda: not _is_running(pid))
        return pid, self.mark(rank, pid)

    def bytes_aside(self, saving: str) -> int:
        """The size of the tensors that are being written as this part."""
        part = self.folder / "checkpoints" / saving.rpartition(": ")[0]
        with suppress(FileNotFoundError):
            return part.with_name(f".{part.name}.partial").stat().st_size
        return 0

    def place(self) -> tuple[str, ...]:
        """Where the workers would go on if they were started now: the newest whole states on disk."""
        whole = [path for path in round_folders(self.folder / "checkpoints") if find_saved(path)]
        if not whole:
            return ()
        sections = sorted(path for path in whole[-1].glob("silo-*/step-*") if find_saved(path))
        newest = {path.parent.name: path.name for path in sections}
        return whole[-1].name, *(f"{silo}/{step}" for silo, step in newest.items())

    def _look(self) -> None:
        now = time.monotonic()
        workers = self.workers()
        for pid in workers.values():
            self.born.setdefault(pid, now)
        new = {rank: pid for rank, pid in workers.items() if pid not in self._dead}
        stepped = [self.mark(rank, pid).steps > 0 for rank, pid in new.items()]
        if self._since is not None and len(stepped) == len(self.marks) and all(stepped):
            if self._dead:
                self.recoveries.append(now - self._since)
            else:
                self.start_seconds = now - self._since
            self._since = None

    def _children(self) -> list[int]:
        pid = self.launcher.pid
        with suppress(OSError):
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    def _rank(self, pid: int) -> int | None:
        """The rank of a child; None while it is not yet a worker."""
        if pid not in self._ranks:
            with suppress(OSError):
                for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"RANK="):
                        self._ranks[pid] = int(variable[5:])
        return self._ranks.get(pid)


@contextmanager
def under_way(tree: dict[str, Any], folder: Path, nproc: int) -> Iterator[Watched]:
    """The run of a resolved configuration, begun; ended when the block is left, finished or not."""
    watched = Watched(tree, folder, nproc)
    try:
        yield watched
    finally:
        left = watched.workers().values()
        if watched.launcher.is_alive():
            watched.launcher.terminate()
        watched.launcher.join(SECONDS_TO_END)
        for pid in (watched.launcher.pid, *left):
            if pid is not None and _is_running(pid):
                os.kill(pid, signal.SIGKILL)
        watched.launcher.join()


def _is_running(pid: int) -> bool:
    """Whether the process has not ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False
