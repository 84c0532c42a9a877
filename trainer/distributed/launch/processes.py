"""Starts the workers of this machine as torchrun does, and waits for them.

torchrun's own agent waits 30 seconds for a worker that does not end, leaves its workers behind when a signal comes that
it does not know, and ends them after 30 seconds when one comes that it knows, saved or not. What it gives them is given
here too: its environment variables, and a store on a free port.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

from trainer.distributed.launch.heartbeat import MIN_SECONDS_BETWEEN_SIGNALS, STOP_SIGNALS
from trainer.distributed.launch.world import World

TRAINER = ("-m", "trainer")
SHUTDOWN_TIMEOUT_SECONDS = 10  # for workers that have lost a peer
POLL_INTERVAL_SECONDS = 0.05


def choose_nproc(nproc: int | str, device: str) -> int:
    """The number of workers: one a visible GPU, else 2, when it is left to us."""
    if nproc != "auto":
        return int(nproc)
    return (torch.cuda.device_count() if device != "cpu" else 0) or 2


def choose_threads(threads: int | str, workers: int) -> int:
    """The CPU threads of one of the workers on this machine: the cores divided, when it is left to us."""
    if threads != "auto":
        return int(threads)
    return max(1, len(os.sched_getaffinity(0)) // workers)


class SignalHandler:
    """What signals have told this process: to stop, and by another one later than a second, to do so at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.kill_requested = False
        self._since = 0.0

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Notes a signal. Whoever waits acts on it."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
        elif now - self._since > MIN_SECONDS_BETWEEN_SIGNALS:
            self.kill_requested = True


@contextmanager
def record_stop_signals() -> Iterator[SignalHandler]:
    """Until the block is left, signals that ask for an end are noted and do nothing else."""
    stop = SignalHandler()
    before = {number: signal.signal(number, stop.handle) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class WorkerFailure:
    """A worker that ended ill: its exit code, or minus the signal that killed it."""

    rank: int
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"rank {self.rank} was killed by {signal.Signals(-self.code).name}"
        return f"rank {self.rank} ended with exit code {self.code}"


class MembershipChanged:
    """Why workers that have not failed have to be started again."""

    def __str__(self) -> str:
        return "a node is lost, or one more has come"


class Workers:
    """This node's processes of one start of the world, by rank; told to leave when this process is."""

    def __init__(
        self, signals: SignalHandler, first_rank: int = 0, membership_changed: Callable[[], bool] = lambda: False
    ):
        self._signals, self._first_rank, self._membership_changed = signals, first_rank, membership_changed
        self._was_terminated = False
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the next rank: Python with these arguments, in a session of its own.

        So what a terminal sends reaches this process alone, which passes it on.
        """
        command = [sys.executable, "-u", *arguments]
        self._processes.append(subprocess.Popen(command, env={**environment}, start_new_session=True))

    def wait(self) -> WorkerFailure | MembershipChanged | None:
        """The failure of the first worker that fails, or that the nodes have changed, at once; None if all is well."""
        while True:
            codes = [process.poll() for process in self._processes]
            failures = [WorkerFailure(rank, code) for rank, code in enumerate(codes, self._first_rank) if code]
            if failures:
                return min(failures, key=lambda failure: failure.code)  # killed ones first: the others may be victims
            if None not in codes:
                return None
            if self._membership_changed():
                return MembershipChanged()
            self._forward_signals()

    def terminate(self) -> None:
        """Ends those that are left. They may save what they have, if that takes seconds."""
        self._terminate()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT_SECONDS
        while self._running():
            self._forward_signals()
            if time.monotonic() > deadline:
                self._kill()

    def _forward_signals(self) -> None:
        """Passes on what this process was told, and lets a moment go by."""
        if self._signals.signal and not self._was_terminated:
            told = f"{self._signals.signal.name}: the workers save and leave; once more ends them at once"
            print(told, file=sys.stderr, flush=True)
            self._terminate()
        if self._signals.kill_requested:
            self._kill()
        time.sleep(POLL_INTERVAL_SECONDS)

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes if process.poll() is None]

    def _terminate(self) -> None:
        """Once: a worker that is told twice need not be one that saves."""
        if not self._was_terminated:
            self._was_terminated = True
            for process in self._running():
                process.terminate()

    def _kill(self) -> None:
        """Kills the workers with what they have started themselves, which nobody else would end."""
        for process in self._running():
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def start_workers(
    world: World,
    threads: int,
    signals: SignalHandler,
    environment: Mapping[str, str],
    arguments: Sequence[str] = TRAINER,
    membership_changed: Callable[[], bool] = lambda: False,
) -> Iterator[Workers]:
    """This node's workers, `python -m trainer` with `environment` beside this process's own; ended with the block."""
    shared = {
        **os.environ,
        **environment,
        "OMP_NUM_THREADS": str(threads),
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(world.workers[world.node]),
        "GROUP_RANK": str(world.node),
        "GROUP_WORLD_SIZE": str(len(world.workers)),
        "MASTER_ADDR": world.host,
        "MASTER_PORT": str(world.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there: rank 0 has none to open
    }
    workers = Workers(signals, world.first_rank, membership_changed)
    try:
        for local_rank in range(world.workers[world.node]):
            rank = world.first_rank + local_rank
            workers.start(arguments, {**shared, "RANK": str(rank), "LOCAL_RANK": str(local_rank)})
        yield workers
    finally:
        workers.terminate()
