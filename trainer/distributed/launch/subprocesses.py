"""Commands that this process starts and waits for, each on its share of the machine, with its output in a file."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from trainer.distributed.launch.heartbeat import STOP_SIGNALS

# Set for a command that is told to leave when the process that started it is killed.
SWEPT = "SILOTRAIN_SWEPT"

PROMPT = "$ python -m trainer"  # at the beginning of what a command writes


@dataclass(frozen=True)
class ResourceSlot:
    """A part of this machine: the numbers of its cores, and what CUDA_VISIBLE_DEVICES says; None leaves it as it is."""

    cores: frozenset[int]
    gpus: str | None = None


class CommandBusyError(Exception):
    """Another process runs this command."""


class Terminated(SystemExit):
    """This process was told to leave, and what it had started has left. Its exit code is that of a preempted run."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


class Command:
    """`python -m trainer` with these arguments, under way; its output is appended to the log.

    Raises Busy while another process, on whichever node, runs the command of this log.
    """

    def __init__(self, arguments: Sequence[str], log: Path, slot: ResourceSlot):
        command = [sys.executable, "-m", "trainer", *arguments]
        gpus = {} if slot.gpus is None else {"CUDA_VISIBLE_DEVICES": slot.gpus}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            _lock(output)
            output.write(f"{PROMPT} {shlex.join(arguments)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **gpus, SWEPT: "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what a terminal sends reaches this process alone, which passes it on
            )
        os.sched_setaffinity(self._process.pid, slot.cores)  # before it has threads: they take it over

    def exit_code(self) -> int | None:
        """The exit code, or minus the signal that killed it; None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Once: it saves what it has. More than a second later again: it ends at once."""
        self._process.terminate()


def _lock(output: BinaryIO) -> None:
    """Locks the file for as long as this command, or anything it has started, has it open."""
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CommandBusyError from None
    except OSError:
        return  # a file system without locks


@contextmanager
def raise_on_stop_signal() -> Iterator[None]:
    """Until the block is left, a signal that asks for an end raises Told; Control-C is Python's own."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = {number: signal.signal(number, leave) for number in STOP_SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reraise_signal(number: signal.Signals) -> None:
    """Leaves after this signal: as the handler that Python or a batch system set for it would, else as one told to."""
    if callable(signal.getsignal(number)):
        signal.raise_signal(number)
    raise Terminated


def command_output(*command: str) -> str | None:
    """What a command prints; None where there is no such command, or it fails."""
    if not shutil.which(command[0]):
        return None
    with suppress(subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return None
