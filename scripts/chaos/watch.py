"""A run, observed from outside: its workers, their activity, and its progress on disk."""

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

    Attributes:
        marks: the activity of each rank.
        born: the time at which each process was first seen, by process id.
        start_seconds: the seconds from launch to the first step of all ranks; None until then, or if a kill came first.
        recoveries: seconds from a kill to the next step of all ranks, for kills that were followed by one.
    """

    def __init__(
        self,
        tree: dict[str, Any],
        folder: Path,
        nproc: int,
        forked: bool = False,
        prepare: Callable[[], None] = lambda: None,
    ):
        self.folder, self.log = folder, folder.with_suffix(".txt")
        marks = folder.with_suffix(".marks")
        marks.mkdir(parents=True, exist_ok=True)
        self.marks = [Marks(marks / str(rank)) for rank in range(nproc)]
        # Forked, because importing torch anew takes seconds.
        start = (tree, marks, self.log, forked, prepare)
        self.launcher = multiprocessing.get_context("fork").Process(target=worker.start, args=start)
        self.launcher.start()
        self.began = time.monotonic()
        self.born: dict[int, float] = {}
        self.start_seconds: float | None = None
        self.recoveries: list[float] = []
        self._dead: set[int] = set()
        self._since: float | None = self.began
        self._ranks: dict[int, int] = {}

    def workers(self) -> dict[int, int]:
        """Return the process ids of the current workers by rank."""
        return {rank: pid for pid in self.children() if (rank := self._rank(pid)) is not None}

    def children(self) -> list[int]:
        """Return the processes that the launcher has started, workers or not yet."""
        pid = self.launcher.pid
        with suppress(OSError):
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    def mark(self, rank: int, pid: int) -> Mark:
        """Return the activity of a worker; one without a mark is starting Python."""
        mark = self.marks[rank].read()
        return mark if mark.pid == pid else Mark(pid, 0, "starting Python", "")

    def wait(self, condition: Callable[[], bool], pause: float = POLL_INTERVAL_SECONDS) -> bool:
        """Wait until the condition holds and return True; return False if the run has ended."""
        while self.launcher.is_alive():
            self._look()
            if condition():
                return True
            time.sleep(pause)
        return False

    def wait_for_start(self) -> bool:
        """Wait until all workers have been started since the last kill; return False if the run has ended."""
        return self.wait(lambda: len(now := self.workers()) == len(self.marks) and not self._dead & set(now.values()))

    def kill(self, rank: int) -> tuple[int, Mark] | None:
        """Kill a worker, and return its process id and its last activity; None if it has ended by itself."""
        workers = self.workers()
        pid = workers.get(rank)
        if pid is None or not is_running(pid):
            return None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self._since, self._dead = time.monotonic(), self._dead | set(workers.values())
        self.wait(lambda: not is_running(pid))
        return pid, self.mark(rank, pid)

    def bytes_aside(self, saving: str) -> int:
        """Return the size of the partial file of tensors of this part."""
        part = self.folder / "checkpoints" / saving.rpartition(": ")[0]
        with suppress(FileNotFoundError):
            return part.with_name(f".{part.name}.partial").stat().st_size
        return 0

    def place(self) -> tuple[str, ...]:
        """Return the names of the newest complete checkpoints, from which new workers would resume."""
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

    def _rank(self, pid: int) -> int | None:
        """Return the rank of a child; None while it is not yet a worker."""
        for rank, marks in enumerate(self.marks):  # a forked one shows the environment of its launcher
            if marks.read().pid == pid:
                return rank
        if pid not in self._ranks:
            with suppress(OSError):
                for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"RANK="):
                        self._ranks[pid] = int(variable[5:])
        return self._ranks.get(pid)


@contextmanager
def under_way(tree: dict[str, Any], folder: Path, nproc: int, forked: bool = False) -> Iterator[Watched]:
    """Start the run of a resolved configuration, with forked workers or not, and end it when the block is left."""
    watched = Watched(tree, folder, nproc, forked)
    try:
        yield watched
    finally:
        left = watched.workers().values()
        if watched.launcher.is_alive():
            watched.launcher.terminate()
        watched.launcher.join(SECONDS_TO_END)
        for pid in (watched.launcher.pid, *left):
            if pid is not None and is_running(pid):
                os.kill(pid, signal.SIGKILL)
        watched.launcher.join()


def is_running(pid: int) -> bool:
    """Return whether the process is running; a zombie is not, once all its threads have ended and freed its files."""
    process = Path(f"/proc/{pid}")
    try:
        state = (process / "stat").read_text().rpartition(") ")[2][0]
        return state not in "ZX" or len(list((process / "task").iterdir())) > 1
    except OSError:
        return False
