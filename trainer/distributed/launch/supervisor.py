"""Processes that do the same work side by side: one that dies is started again, and the others never notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from trainer.distributed.environment import PARENT_PID
from trainer.distributed.launch.processes import POLL_INTERVAL_SECONDS
from trainer.distributed.launch.signals import SignalHandler

FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 30.0  # before a restart; twice as long after each quick death
HEALTHY_SECONDS = 60  # after so long a life the delay is the first one again


class _Replica:
    """One of the processes, over all its starts."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self._name, self._command, self._environment = name, command, environment
        self._delay_seconds = FIRST_DELAY_SECONDS / 2
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self._due = 0.0
        self._started_at = time.monotonic()
        # In a session of its own: signals of a terminal reach this process alone, which passes them on.
        self.process = subprocess.Popen(self._command, env=self._environment, start_new_session=True)

    def keep_running(self, code: int) -> None:
        """Start the process again after it has ended with this code; at first say so, and wait."""
        now = time.monotonic()
        if not self._due:
            lived_long = now - self._started_at > HEALTHY_SECONDS
            self._delay_seconds = FIRST_DELAY_SECONDS if lived_long else min(2 * self._delay_seconds, MAX_DELAY_SECONDS)
            self._due = now + self._delay_seconds
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            message = f"{self._name} {how}; it is started again in {self._delay_seconds:g} s"
            print(message, file=sys.stderr, flush=True)
        elif now >= self._due:
            self.start()


def supervise(
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    signals: SignalHandler,
    stop_timeout_seconds: float,
    fatal_code: int,
) -> int:
    """Keep processes of Python running until a stop signal, which they get as SIGTERM, and wait for their end.

    Args:
        arguments: of Python, for each of them.
        environments: variables of each of them, beside those of this process.
        signals: the stop signals of this process.
        stop_timeout_seconds: how long they may take to stop; a second signal ends them at once.
        fatal_code: an exit code after which no restart helps, if a process ends with it in its first start.

    Returns:
        the exit code: 0 after a stop, or `fatal_code`.
    """
    command = [sys.executable, "-u", *arguments]
    common = {**os.environ, PARENT_PID: str(os.getpid())}
    replicas: list[_Replica] = []
    try:
        for index, own in enumerate(environments):
            replicas.append(_Replica(f"worker {index}", command, {**common, **own}))
        while not signals.signal:
            for replica in replicas:
                code = replica.process.poll()
                if code == fatal_code and replica.starts == 1:
                    return fatal_code
                if code is not None:
                    replica.keep_running(code)
            time.sleep(POLL_INTERVAL_SECONDS)
        return 0
    finally:
        _stop([replica.process for replica in replicas], signals, stop_timeout_seconds)


def _stop(processes: Sequence[subprocess.Popen[bytes]], signals: SignalHandler, timeout_seconds: float) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + timeout_seconds
    while running := [process for process in processes if process.poll() is None]:
        if signals.kill_requested or time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(POLL_INTERVAL_SECONDS)
