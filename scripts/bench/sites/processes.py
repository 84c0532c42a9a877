"""Members of a federation as processes of this machine, which are asked over pipes, and watched from outside."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.federation.certificates import certify
from trainer.federation.link import COORDINATOR

TICKS = os.sysconf("SC_CLK_TCK")  # of processor time in /proc, a second
PROC_FIELDS = {"RssAnon": "anonymous", "RssFile": "mapped"}
SAMPLE_SECONDS = 0.02  # a copy of 100M parameters takes longer
ANSWER_SECONDS = 300
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # of version 1, of version 2
KILO = 1024
FLOAT_BYTES = 4


class MemberError(RuntimeError):
    """A process has ended, or does not answer."""


@dataclass
class Peaks:
    """The largest memory of a process since the last reset, in bytes.

    Attributes:
        anonymous: that it has written itself: tensors, messages.
        mapped: of files that it has mapped: libraries, and the spool while it is read.
        group: of its control group, the page cache of the files that it writes included; 0 without one.
        cache: the part of it that is page cache.
    """

    anonymous: int = 0
    mapped: int = 0
    group: int = 0
    cache: int = 0


@dataclass
class Process:
    """A worker (`worker.py`) and the pipes to it.

    Attributes:
        role: of the worker.
        popen: the process.
        group: its control group; None without one.
        base: its memory when it had started.
        peaks: the largest since then.
    """

    role: str
    popen: subprocess.Popen[str]
    group: Path | None
    base: Peaks = field(default_factory=Peaks)
    peaks: Peaks = field(default_factory=Peaks)

    def tell(self, command: str) -> None:
        """Send a command."""
        assert self.popen.stdin
        try:
            self.popen.stdin.write(f"{command}\n")
            self.popen.stdin.flush()
        except BrokenPipeError as error:
            raise MemberError(f"the {self.role} has ended with {self.popen.wait()}") from error

    def answer(self) -> dict[str, Any]:
        """Return the next answer."""
        assert self.popen.stdout
        late = threading.Timer(ANSWER_SECONDS, self.popen.kill)
        late.start()
        try:
            line = self.popen.stdout.readline()
        finally:
            late.cancel()
        if not line:
            raise MemberError(f"the {self.role} has ended with {self.popen.wait()}")
        return json.loads(line)

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command, and return its answer."""
        self.tell(command)
        return self.answer()

    def processor_seconds(self) -> float:
        """Return the processor time that the process has taken so far, of all its threads."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def threads(self) -> int:
        """Return the number of threads of the process."""
        return len(os.listdir(f"/proc/{self.popen.pid}/task"))

    def sample(self) -> None:
        """Take the memory of this moment into the peaks."""
        with suppress(OSError):  # the process has ended
            status = Path(f"/proc/{self.popen.pid}/status").read_text()
            held = dict(line.split(":", 1) for line in status.splitlines() if line.startswith("Rss"))
            for name, attribute in PROC_FIELDS.items():
                size = int(held[name].split()[0]) * KILO
                setattr(self.peaks, attribute, max(size, getattr(self.peaks, attribute)))
            if self.group:
                total, cache = _group_bytes(self.group)
                if total > self.peaks.group:
                    self.peaks.group, self.peaks.cache = total, cache


@contextmanager
def start(role: str, options: Mapping[str, Any], inside: Sequence[str] = ()) -> Iterator[Process]:
    """Start a worker of a role, and kill it when the block is left.

    Args:
        role: one of worker.py.
        options: of the role, as JSON.
        inside: the command that runs a command in another network.
    """
    command = [*inside, sys.executable, "-W", "ignore", "-m", "scripts.bench.sites.worker", role, json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    group = _new_group(role)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as popen:
        if group:
            (group / "cgroup.procs").write_text(str(popen.pid))
        try:
            yield Process(role, popen, group)
        finally:
            popen.kill()
            popen.wait()
            if group:
                with suppress(OSError):
                    group.rmdir()


@contextmanager
def watching(processes: Sequence[Process]) -> Iterator[None]:
    """Sample the memory of processes while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            for process in processes:
                process.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def start_all(
    roles: Sequence[tuple[str, Mapping[str, Any]]], inside: Sequence[Sequence[str]] | None = None
) -> Iterator[list[Process]]:
    """Start several workers at once, and wait until each has answered that it is there."""
    with ExitStack() as stack:
        processes = [
            stack.enter_context(start(role, options, inside[place] if inside else ()))
            for place, (role, options) in enumerate(roles)
        ]
        for process in processes:
            process.answer()
            process.sample()
            process.base = replace(process.peaks)
        yield processes


def options_of(folder: str, members: Sequence[str]) -> dict[str, Any]:
    """Return the options of all roles, with certificates in the folder and an address that is free.

    Args:
        folder: of all files; the coordinator's spool is there, too.
        members: names of the sites.
    """
    certificates = Path(folder) / "certificates"
    missing = [name for name in (COORDINATOR, *members) if not (certificates / f"{name}.pem").exists()]
    if missing:
        certify(certificates, missing)
    run_dir = tempfile.mkdtemp(dir=folder)
    address = f"127.0.0.1:{free_port()}"
    return {"members": list(members), "certificates": str(certificates), "address": address, "run_dir": run_dir}


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _new_group(role: str) -> Path | None:
    """Make a control group that counts memory; None where that is not allowed."""
    for root in MEMORY_GROUPS:
        if (root / "memory.stat").exists() or (root / "cgroup.controllers").exists():
            group = root / f"bench-{role}-{os.getpid()}-{free_port()}"
            with suppress(OSError):
                group.mkdir()
                if (group / "memory.stat").exists():
                    return group
                group.rmdir()
    return None


def _group_bytes(group: Path) -> tuple[int, int]:
    """Return the memory that a control group is charged for, and the part of it that is page cache."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    if "cache" in stat:  # version 1
        return int(stat["rss"]) + int(stat["cache"]), int(stat["cache"])
    return int((group / "memory.current").read_text()), int(stat["file"])
