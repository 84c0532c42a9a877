"""Commands that this process starts and waits for, each on its part of the machine."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from trainer.distributed.environment import PARENT_PID
from trainer.distributed.launch.processes import TRAINER, count_gpus

T = TypeVar("T")

PROMPT = "$ python -m trainer"  # at the beginning of a command's output


@dataclass(frozen=True)
class ResourceSlot:
    """A part of this machine.

    cores  the numbers of its CPU cores
    gpus   a value of CUDA_VISIBLE_DEVICES; None leaves it as it is
    """

    cores: frozenset[int]
    gpus: str | None = None


def resource_slots(jobs: int) -> list[ResourceSlot]:
    """Divide this machine's cores and GPUs among a number of jobs at a time.

    With fewer cores than jobs, jobs share cores. With fewer GPUs than jobs, all jobs see all GPUs: they run on CPUs.
    """
    if jobs == 1:
        return [ResourceSlot(frozenset(os.sched_getaffinity(0)))]
    cores = sorted(os.sched_getaffinity(0))
    gpus = visible_gpus()
    return [
        ResourceSlot(
            frozenset(slice_items(cores, index, jobs) or [cores[index % len(cores)]]),
            ",".join(slice_items(gpus, index, jobs)) if len(gpus) >= jobs else None,
        )
        for index in range(jobs)
    ]


def visible_gpus() -> list[str]:
    """Return the GPUs of this machine, by their names in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = count_gpus()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def slice_items(items: Sequence[T], index: int, parts: int) -> Sequence[T]:
    """Return one of `parts` parts of a sequence, whose lengths differ by at most 1."""
    return items[len(items) * index // parts : len(items) * (index + 1) // parts]


class CommandBusyError(Exception):
    """Another process runs this command."""


class Command:
    """A running `python -m trainer`, whose output is appended to a log, or is that of this process.

    slot   the part of the machine that it may use
    begun  when it was started, by the monotonic clock

    Args:
        arguments: of the command line
        log: the file for its output, locked until the command and all that it has started have ended; None: no file
        slot: the part of the machine that it may use

    Raises:
        CommandBusyError: another process, on whichever node, runs the command of this log
    """

    def __init__(self, arguments: Sequence[str], log: Path | None, slot: ResourceSlot):
        self.slot, self.begun = slot, time.monotonic()
        command = [sys.executable, *TRAINER, *arguments]
        gpus = {} if slot.gpus is None else {"CUDA_VISIBLE_DEVICES": slot.gpus}
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") if log else nullcontext() as output:
            if output:
                _lock(output)
                output.write(f"{PROMPT} {shlex.join(arguments)}\n".encode())
                output.flush()
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **gpus, PARENT_PID: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output and subprocess.STDOUT,
                start_new_session=True,  # signals of a terminal reach this process alone, which passes them on
            )
        os.sched_setaffinity(self._process.pid, slot.cores)  # before it has threads, which inherit it

    def exit_code(self) -> int | None:
        """Return the exit code, or minus the number of the signal that killed it; None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask the command to save and stop; more than a second later, a second call ends it at once."""
        self._process.terminate()


def log_tail(log: Path, lines: int) -> str:
    """Return the last lines of the output of a command, since its last start."""
    text = log.read_text(errors="replace") if log.exists() else ""
    written = text.rpartition(PROMPT)[2].splitlines()[1:]
    return "\n".join([line for line in written if line.strip()][-lines:])


def _lock(output: BinaryIO) -> None:
    """Lock the file for as long as this command, or anything it has started, has it open."""
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CommandBusyError from None
    except OSError:
        return  # a file system without locks


def command_output(*command: str) -> str | None:
    """Return the output of a command; None if it is not installed, or fails."""
    if not shutil.which(command[0]):
        return None
    with suppress(subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return None
