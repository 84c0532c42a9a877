"""The lock of a run folder: one launch at a time owns it, on whichever machine.

Processes of one machine exclude each other by a lock of the kernel, which ends with its process. Between machines such
locks are not to be relied on: a file server keeps those of a dead client for a while, and some know none. There the
owner's heartbeat counts: the modification time of the file, by the clock of the disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import socket
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

from trainer.distributed.launch.signals import hard_exit

HEARTBEAT_INTERVAL_SECONDS = 5
HEARTBEAT_TIMEOUT_SECONDS = 30  # after which a silent owner is taken to be dead
POLL_INTERVAL_SECONDS = 0.5
SETTLE_SECONDS = 1  # for another machine to take the folder of a dead owner at the same moment

MAX_BYTES = 4096
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of Linux


@dataclass(frozen=True)
class Owner:
    """The process that owns a run folder.

    Attributes:
        host: the name of its machine.
        pid: its number.
        kernel: the same in all containers of a machine, and another one after its next start.
        since: when it has taken the folder, in seconds since the epoch.
    """

    host: str
    pid: int
    kernel: str
    since: float

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


def _this_process() -> Owner:
    kernel = BOOT_ID.read_text().strip() if BOOT_ID.exists() else platform.node()
    return Owner(socket.gethostname(), os.getpid(), kernel, time.time())


class RunLock:
    """The lock of a folder. Its file is there for as long as a process owns the folder, or was killed in it."""

    def __init__(self, folder: Path):
        self.path = folder / "lock.json"
        self._descriptor: int | None = None
        self._is_released = Event()
        self._heartbeat: Thread | None = None

    def acquire(self) -> None:
        """Own the folder until `release`, or until this process has ended.

        Raises:
            ValueError: another process owns it.
        """
        this = _this_process()
        while self._descriptor is None:
            self._descriptor = self._try_acquire(this)
        self._is_released.clear()
        self._heartbeat = Thread(target=self._beat, args=(self._descriptor, this), daemon=True)
        self._heartbeat.start()

    def release(self) -> None:
        """Let others have the folder, if this process owns it."""
        if self._descriptor is None or self._heartbeat is None:
            return
        self._is_released.set()
        self._heartbeat.join()
        if self._is_current(self._descriptor):
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _try_acquire(self, this: Owner) -> int | None:
        """Return the open file by which this process owns the folder; None if another try is needed."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)  # once: its first close ends all locks on it
        is_owned = False
        try:
            is_owned = self._take(descriptor, this)
        finally:
            if not is_owned:
                os.close(descriptor)
        if is_owned:
            return descriptor
        time.sleep(POLL_INTERVAL_SECONDS)
        return None

    def _take(self, descriptor: int, this: Owner) -> bool:
        """Write this process into the file unless its owner lives; return whether no other was quicker."""
        is_locked, owner = _try_lock(descriptor), _read(descriptor)  # in this order: nobody writes without the lock
        is_local = owner is not None and owner.kernel == this.kernel and is_locked is not None
        if owner and is_local and not is_locked:
            raise self._busy(owner)
        if owner and not is_local:
            self._wait_for_silence(owner)
            if is_locked is False and self._is_current(descriptor):
                self.path.unlink()  # a file server still holds the lock of a machine that is gone
        if is_locked is False or not self._is_current(descriptor):
            return False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(this)).encode(), 0)
        os.fsync(descriptor)
        time.sleep(SETTLE_SECONDS if owner and not is_local else 0)
        return self._is_current(descriptor) and _read(descriptor) == this

    def _wait_for_silence(self, owner: Owner) -> None:
        """Wait until the owner, on another machine, has been silent for too long; raise ValueError if it is not."""
        last_beat = self.path.stat().st_mtime
        while self._disk_time() - last_beat < HEARTBEAT_TIMEOUT_SECONDS:
            time.sleep(POLL_INTERVAL_SECONDS)
            if not self.path.exists():
                return
            if self.path.stat().st_mtime != last_beat:
                raise self._busy(owner)

    def _disk_time(self) -> float:
        """Return the time by the clock of the disk: those of machines may differ."""
        with tempfile.TemporaryFile(dir=self.path.parent) as file:
            return os.fstat(file.fileno()).st_mtime

    def _busy(self, owner: Owner) -> ValueError:
        remedy = "wait until that run has ended, or choose another run_dir"
        return ValueError(f"run_dir={self.path.parent} is in use by {owner}.\n  {remedy}")

    def _is_current(self, descriptor: int) -> bool:
        """Return whether an open file is still the one of this name."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        return False

    def _beat(self, descriptor: int, this: Owner) -> None:
        """Show that this process lives. It ends if it was taken to be dead, and another has the folder now."""
        while not self._is_released.wait(HEARTBEAT_INTERVAL_SECONDS):
            with suppress(OSError):  # a disk that fails ends the run where it writes
                if self.path.exists() and not (self._is_current(descriptor) and _read(descriptor) == this):
                    message = f"run_dir={self.path.parent} was taken by another run: this one was silent for too long"
                    print(message, file=sys.stderr, flush=True)
                    hard_exit()
                os.utime(self.path)


def _try_lock(descriptor: int) -> bool | None:
    """Lock an open file; return whether that has succeeded, None if its file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _read(descriptor: int) -> Owner | None:
    """Return the owner that is written in an open file; None before it is."""
    try:
        return Owner(**json.loads(os.pread(descriptor, MAX_BYTES, 0)))
    except (ValueError, TypeError):
        return None
