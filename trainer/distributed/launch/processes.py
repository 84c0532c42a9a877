"""Starts the workers of this machine as torchrun does, and waits for them.

torchrun's own agent is not used. It waits 30 seconds for a worker that does not end. It leaves its workers behind at a
signal that it does not know, and kills them 30 seconds after one that it knows, saved or not. The workers get here what
they get from it: its environment variables. Rank 0 also gets a socket that listens, for the store of all ranks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from trainer.distributed.environment import LAUNCHER_PID, LISTENER
from trainer.distributed.launch.signals import SignalHandler
from trainer.distributed.launch.world import World
from trainer.distributed.token import TOKEN

# The command line as arguments of Python: by its path, because -m prefers a user's own trainer.py.
TRAINER = (str(Path(__file__).parents[2] / "commands" / "silotrain.py"),)
SHUTDOWN_TIMEOUT_SECONDS = 10  # for workers that have lost a peer
POLL_INTERVAL_SECONDS = 0.05


def choose_nproc(nproc: int | str, device: str) -> int:
    """Return the number of workers of a node; `auto` is one for each visible GPU, else 2."""
    if nproc != "auto":
        return int(nproc)
    return (count_gpus() if device != "cpu" else 0) or 2


def count_gpus() -> int:
    """Return `torch.cuda.device_count()`. NVIDIA's driver is asked, because importing torch takes a second."""
    torch = find_spec("torch")
    assert torch and torch.origin
    libraries = Path(torch.origin).parent / "lib"
    if (libraries / "libtorch_hip.so").exists():
        import torch

        return torch.cuda.device_count()
    if not (libraries / "libtorch_cuda.so").exists():
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def choose_threads(threads: int | str, workers: int) -> int:
    """Return the CPU threads of each worker of this node; `auto` divides the cores among them."""
    if threads != "auto":
        return int(threads)
    return max(1, len(os.sched_getaffinity(0)) // workers)


@dataclass(frozen=True)
class WorkerFailure:
    """A worker that failed.

    rank  its global rank
    code  its exit code, or minus the number of the signal that killed it
    """

    rank: int
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"rank {self.rank} was killed by {signal.Signals(-self.code).name}"
        if self.code == 0:
            return f"rank {self.rank} ended in mid-run, with exit code 0: something in it has called exit"
        return f"rank {self.rank} ended with exit code {self.code}"


class MembershipChanged:
    """The reason to start workers again that have not failed."""

    def __str__(self) -> str:
        return "a node is lost, or one more has come"


class Workers:
    """The worker processes of this node in one start of the world, in rank order.

    Args:
        signals: the stop signals of this process, which are passed on to the workers
        first_rank: the global rank of the first of them
        membership_changed: whether the nodes of the world have changed
    """

    def __init__(
        self, signals: SignalHandler, first_rank: int = 0, membership_changed: Callable[[], bool] = lambda: False
    ):
        self._signals, self._first_rank, self._membership_changed = signals, first_rank, membership_changed
        self._was_terminated = False
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], sockets: Sequence[int] = ()) -> None:
        """Start the next rank: Python with these arguments, which inherits these sockets."""
        command = [sys.executable, "-u", *arguments]
        # In a session of its own: signals of a terminal reach this process alone, which passes them on.
        process = subprocess.Popen(command, env={**environment}, pass_fds=sockets, start_new_session=True)
        self._processes.append(process)

    def wait(self) -> WorkerFailure | MembershipChanged | None:
        """Wait until all workers have ended, one has failed, or the nodes have changed; None if all went well."""
        while True:
            codes = [process.poll() for process in self._processes]
            if any(codes):
                # Killed ones first, then those that left as if all were well, unasked: the others may be victims.
                may_leave = (None, 0) if self._signals.signal else (None,)
                code, rank = min((code, rank) for rank, code in enumerate(codes) if code not in may_leave)
                return WorkerFailure(self._first_rank + rank, code or 0)
            if None not in codes:
                return None
            if self._membership_changed():
                return MembershipChanged()
            self._forward_signals()

    def terminate(self) -> None:
        """Ask the workers that still run to stop, and kill those that have not within a few seconds."""
        self._terminate()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT_SECONDS
        while self._running():
            self._forward_signals()
            if time.monotonic() > deadline:
                self._kill()

    def _forward_signals(self) -> None:
        """Pass on the signals that this process has received, and sleep for a moment."""
        if self._signals.signal and not self._was_terminated:
            message = f"{self._signals.signal.name}: the workers save and stop; a second signal ends them at once"
            print(message, file=sys.stderr, flush=True)
            self._terminate()
        if self._signals.kill_requested:
            self._kill()
        time.sleep(POLL_INTERVAL_SECONDS)

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes if process.poll() is None]

    def _terminate(self) -> None:
        """Send SIGTERM, once: a second one would end a worker that is saving."""
        if not self._was_terminated:
            self._was_terminated = True
            for process in self._running():
                process.terminate()

    def _kill(self) -> None:
        """Kill the workers with the processes that they have started, which nobody else would end."""
        for process in self._running():
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def start_workers(
    world: World,
    token: bytes,
    threads: int,
    signals: SignalHandler,
    environment: Mapping[str, str],
    arguments: Sequence[str] = TRAINER,
    membership_changed: Callable[[], bool] = lambda: False,
) -> Iterator[Workers]:
    """Start the workers of this node, and end them with the block.

    Args:
        world: the nodes of this start
        token: of the launch
        threads: the CPU threads of each worker
        signals: the stop signals of this process, which are passed on to the workers
        environment: variables of the workers, beside those of this process
        arguments: of Python
        membership_changed: whether the nodes of the world have changed
    """
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
        TOKEN: token.decode(),
        LAUNCHER_PID: str(os.getpid()),
    }
    workers = Workers(signals, world.first_rank, membership_changed)
    try:
        for local_rank in range(world.workers[world.node]):
            rank = world.first_rank + local_rank
            own, sockets = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}, []
            if world.listener and rank == 0:
                sockets = [world.listener.fileno()]
                own[LISTENER] = str(sockets[0])
            workers.start(arguments, {**shared, **own}, sockets)
        if world.listener:
            world.listener.close()  # rank 0 has it: when that ends, nothing listens
        yield workers
    finally:
        workers.terminate()
