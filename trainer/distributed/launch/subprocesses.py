"""Commands that this process starts and waits for, each on its part of the machine, with its output in a file."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainer.distributed.environment import PARENT_PID
from trainer.distributed.launch.processes import TRAINER

PROMPT = "$ python -m trainer"  # at the beginning of a command's output


@dataclass(frozen=True)
class ResourceSlot:
    """A part of this machine.

    cores  the numbers of its CPU cores
    gpus   a value of CUDA_VISIBLE_DEVICES; None leaves it as it is
    """

    cores: frozenset[int]
    gpus: str | None = None


class CommandBusyError(Exception):
    """Another process runs this command."""


class Command:
    """A running `python -m trainer`, whose output is appended to a log.

    slot   the part of the machine that it may use
    begun  when it was started, by the monotonic clock

    Args:
        arguments: of the command line
        log: the file for its output, locked until the command and all that it has started have ended
        slot: the part of the machine that it may use

    Raises:
        CommandBusyError: another process, on whichever node, runs the command of this log
    """

    def __init__(self, arguments: Sequence[str], log: Path, slot: ResourceSlot):
        self.slot, self.begun = slot, time.monotonic()
        command = [sys.executable, *TRAINER, *arguments]
        gpus = {} if slot.gpus is None else {"CUDA_VISIBLE_DEVICES": slot.gpus}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            _lock(output)
            output.write(f"{PROMPT} {shlex.join(arguments)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **gpus, PARENT_PID: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # signals of a terminal reach this process alone, which passes them on
            )
        os.sched_setaffinity(self._process.pid, slot.cores)  # before it has threads, which inherit it

    def exit_code(self) -> int | None:
        """Return the exit code, or minus the number of the signal that killed it; None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask the command to save and stop; more than a second later, a second call ends it at once."""
        self._process.terminate()


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
