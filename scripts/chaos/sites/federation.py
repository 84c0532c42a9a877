"""A coordinator and its sites, each a launch that is started again whenever it has not finished, as a cluster would."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scripts.chaos.marks import Mark
from scripts.chaos.watch import Watched, is_running
from trainer.checkpoint.run_dir import RunDir
from trainer.commands.exit_codes import FINISHED, PREEMPTED
from trainer.loggers import Metrics

POLL_SECONDS = 0.005
SECONDS_TO_DIE = 10


class Member:
    """A site or the coordinator, over all its starts.

    Attributes:
        name: of the member.
        run_dir: its run folder.
        starts: how often it was started.
        failure: why it cannot go on; empty if it can.
        absent_until: the reading of the monotonic clock before which it is not started again.
    """

    def __init__(self, name: str, tree: dict[str, Any], run_dir: Path, prepare: Callable[[], None] = lambda: None):
        self.name, self.tree, self.run_dir, self.starts, self.failure = name, tree, run_dir, 0, ""
        self.prepare, self.absent_until = prepare, 0.0
        self.place: tuple[str, ...] | None = None
        self.start()

    def start(self) -> None:
        """Start the launch."""
        self.starts += 1
        nproc = self.tree["launch"]["nproc_per_node"]
        self.run = Watched(self.tree, self.run_dir, nproc, forked=True, prepare=self.prepare)

    def tend(self) -> None:
        """Start the launch again if it was killed or preempted."""
        code = self.run.launcher.exitcode
        if code in (-signal.SIGKILL, PREEMPTED):
            if time.monotonic() >= self.absent_until:
                self.start()
        elif code not in (None, FINISHED):
            self.failure = f"{self.name} ended with exit code {code}: {self.run.log}"

    @property
    def has_finished(self) -> bool:
        return self.run.launcher.exitcode == FINISHED

    @property
    def is_up(self) -> bool:
        """Whether all its processes run, and take signals as they should."""
        return self.run.launcher.exitcode is None and len(self.run.workers()) == len(self.run.marks)

    def mark(self, rank: int = 0) -> Mark:
        """Return what a rank is doing."""
        return self.run.mark(rank, self.run.workers().get(rank, 0))

    def kill(self, absent_seconds: float = 0.0) -> None:
        """Kill all its processes at once, as when its host dies."""
        pids = self.pause()
        for pid in pids:
            _send(pid, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS_TO_DIE
        while any(map(is_running, pids)):
            assert time.monotonic() < deadline, pids
            time.sleep(POLL_SECONDS)
        self.run.launcher.join()
        self.absent_until = time.monotonic() + absent_seconds

    def kill_rank(self, rank: int) -> bool:
        """Kill a rank, which its launcher starts again; return whether it could: without progress it may not."""
        place = self.run.place()
        if place == self.place or not self.is_up:
            return False
        self.place = place
        return self.run.kill(rank) is not None

    def preempt(self) -> None:
        """Ask the launch to save and to leave."""
        _send(self._launcher, signal.SIGTERM)

    def pause(self) -> list[int]:
        """Stop all its processes, the launcher first: it starts no further one. Return them."""
        _send(self._launcher, signal.SIGSTOP)
        workers = self.run.children()
        for pid in workers:
            _send(pid, signal.SIGSTOP)
        return [self._launcher, *workers]

    def go_on(self) -> None:
        """Let stopped processes go on, the workers first."""
        for pid in (*self.run.children(), self._launcher):
            _send(pid, signal.SIGCONT)

    def logged(self) -> list[Metrics]:
        """Return the rounds that it has logged, without one that it is writing."""
        with suppress(OSError):
            lines = RunDir(self.run_dir).metrics.read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        return []

    @property
    def _launcher(self) -> int:
        assert self.run.launcher.pid is not None
        return self.run.launcher.pid


class Federation:
    """The members of a run.

    Args:
        trees: the configuration of each member; the coordinator is the first.
        folder: has a run folder for each.
        prepare: is called by the launches of a member first.
    """

    def __init__(
        self,
        trees: Mapping[str, dict[str, Any]],
        folder: Path,
        prepare: Mapping[str, Callable[[], None]] = MappingProxyType({}),
    ):
        self.began = time.monotonic()
        self.members = {
            name: Member(name, tree, folder / name, prepare.get(name, lambda: None)) for name, tree in trees.items()
        }

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the condition holds; return False when it has not in that time, or the run has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.has_ended:
            for member in self.members.values():
                member.tend()
            if condition():
                return True
            time.sleep(POLL_SECONDS)
        return False

    @property
    def has_ended(self) -> bool:
        """Whether all members have finished, or one has failed."""
        members = self.members.values()
        return any(member.failure for member in members) or all(member.has_finished for member in members)

    @property
    def failures(self) -> list[str]:
        return [member.failure for member in self.members.values() if member.failure]


@contextmanager
def under_way(
    trees: Mapping[str, dict[str, Any]],
    folder: Path,
    prepare: Mapping[str, Callable[[], None]] = MappingProxyType({}),
) -> Iterator[Federation]:
    """Start a federation, and end what is left of it with the block."""
    federation = Federation(trees, folder, prepare)
    try:
        yield federation
    finally:
        for member in federation.members.values():
            if member.run.launcher.exitcode is None:
                member.kill()


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
