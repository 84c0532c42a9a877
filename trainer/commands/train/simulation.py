"""A federation on this machine: a coordinator and sites, as launches of their own."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainer.checkpoint.files import private_files
from trainer.checkpoint.run_dir import RunDir
from trainer.commands.exit_codes import BAD_INPUT, FAILED, FINISHED, PREEMPTED
from trainer.config.overrides import literal
from trainer.distributed.launch.processes import POLL_INTERVAL_SECONDS
from trainer.distributed.launch.reachability import LOOPBACK
from trainer.distributed.launch.signals import SignalHandler, handle_stop_signals
from trainer.distributed.launch.subprocesses import Command, ResourceSlot, log_tail, resource_slots
from trainer.federation.options import COORDINATOR, SiteOptions

LOG_TAIL_LINES = 12
SECONDS_TO_AGREE = 5  # within which the coordinator finds the bad input that a site has found


def simulate(tree: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """Start a coordinator and its sites, with certificates that are thrown away, and wait until they have ended.

    The coordinator prints the progress; what each site prints is in a file of the run folder.

    Args:
        tree: the resolved configuration.
        overrides: of which it was composed.

    Returns:
        The exit code of the coordinator, or that of the site without which the others could not go on.
    """
    from trainer.federation.certificates import certify  # with cryptography, which other runs do without

    site, folder = SiteOptions(**tree["site"]), RunDir(Path(tree["run_dir"]))
    names = list(site.members)
    with (
        private_files(),
        handle_stop_signals() as signals,
        TemporaryDirectory(prefix="silotrain-") as certificates,
        _reserved_port() as port,
    ):
        certify(Path(certificates), [COORDINATOR, *names])
        address = literal(f"{LOOPBACK}:{port}")
        common = [*overrides, f"site.members={literal(names)}", f"site.certificates={literal(certificates)}"]
        place = [f"site.listen={address}", f"run_dir={literal(str(folder.path))}"]
        whole_machine = ResourceSlot(frozenset(os.sched_getaffinity(0)))
        coordinator = Command([COORDINATOR, *common, *place], None, whole_machine)
        sites: dict[str, _Site] = {}
        for name, slot in zip(names, resource_slots(len(names)), strict=True):
            log, run_dir = folder.sites / f"{name}.log", literal(str(folder.sites / name))
            place = [f"site.name={name}", f"site.server={address}", "site.listen=null", f"run_dir={run_dir}"]
            sites[name] = _Site(Command([*common, *place], log, slot), log)
        return _Federation(coordinator, sites, site.quorum, signals).wait()


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Yield a free port of the loopback, which no other process is given meanwhile, though one of ours may listen."""
    with socket.socket() as reserving:
        reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserving.bind((LOOPBACK, 0))
        yield reserving.getsockname()[1]


@dataclass(frozen=True)
class _Site:
    """The launch of a site, and the file with its output."""

    command: Command
    log: Path


class _Federation:
    """The launches of a federation.

    Args:
        coordinator: its launch.
        sites: those of the sites, by name.
        min_members: sites without which the others cannot go on.
        signals: the stop signals of this process, which are passed on.
    """

    def __init__(self, coordinator: Command, sites: Mapping[str, _Site], min_members: int, signals: SignalHandler):
        self._coordinator, self._sites, self._min_members, self._signals = coordinator, sites, min_members, signals
        self._commands = [coordinator, *(site.command for site in sites.values())]
        self._failures: dict[str, int] = {}  # exit codes of sites
        self._stops = 0  # how often all were asked to stop

    def wait(self) -> int:
        """Wait until all have ended; return the exit code of the whole."""
        while True:
            self._report_failures()
            if None not in (command.exit_code() for command in self._commands):
                return self._exit_code()
            if (self._must_stop() and self._stops == 0) or (self._signals.kill_requested and self._stops == 1):
                self._stops += 1
                for command in self._commands:
                    command.terminate()
            time.sleep(POLL_INTERVAL_SECONDS)

    def _must_stop(self) -> bool:
        has_failed = self._coordinator.exit_code() not in (None, FINISHED)
        return has_failed or self._lacks_sites() or self._signals.signal is not None

    def _lacks_sites(self) -> bool:
        return len(self._sites) - len(self._failures) < self._min_members

    def _report_failures(self) -> None:
        """Print which sites have failed, unless they were asked to stop."""
        for name, site in self._sites.items():
            code = site.command.exit_code()
            if self._stops or self._signals.signal or not code or name in self._failures:
                continue
            self._failures[name] = code
            if code == BAD_INPUT and self._coordinator_agrees():
                continue
            print(f"{name} has ended with exit code {code}; the end of {site.log}:", file=sys.stderr)
            print(log_tail(site.log, LOG_TAIL_LINES), file=sys.stderr, flush=True)

    def _coordinator_agrees(self) -> bool:
        """Return whether the coordinator ends for bad input, too, which it prints itself."""
        deadline = time.monotonic() + SECONDS_TO_AGREE
        while self._coordinator.exit_code() is None and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_SECONDS)
        return self._coordinator.exit_code() == BAD_INPUT

    def _exit_code(self) -> int:
        code = next(iter(self._failures.values())) if self._lacks_sites() else self._coordinator.exit_code()
        assert code is not None
        if code < 0:  # killed by a signal, before it could take it, or by somebody else
            return PREEMPTED if self._signals.signal else FAILED
        return code
