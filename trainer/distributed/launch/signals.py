"""Stop signals: recorded and acted on in a thread, or raised as an exception.

The main thread may wait in a collective or in a call to the store, where no signal handler of Python runs. A thread
therefore reads the signal numbers that the interpreter writes to a socket (`signal.set_wakeup_fd`).
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
MIN_SECONDS_BETWEEN_SIGNALS = 1  # terminals and batch systems often deliver a signal twice


class Terminated(SystemExit):
    """This process was asked to stop, and its children have stopped. The exit code is that of a preempted run."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


class SignalHandler:
    """Records the first stop signal, and whether a later one asks to end at once.

    A signal that follows the first within `MIN_SECONDS_BETWEEN_SIGNALS` is the same one, delivered twice.

    Args:
        on_stop: called at the first signal
        on_kill: called at each later one
    """

    def __init__(self, on_stop: Callable[[], None] = lambda: None, on_kill: Callable[[], None] = lambda: None):
        self.signal: signal.Signals | None = None
        self.kill_requested = False
        self._on_stop, self._on_kill = on_stop, on_kill
        self._received_at = 0.0

    def handle(self, number: int) -> None:
        """Record a signal, and call `on_stop` or `on_kill`."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._received_at = signal.Signals(number), now
            self._on_stop()
        elif now - self._received_at > MIN_SECONDS_BETWEEN_SIGNALS:
            self.kill_requested = True
            self._on_kill()


@contextmanager
def handle_stop_signals(
    on_stop: Callable[[], None] = lambda: None, on_kill: Callable[[], None] = lambda: None
) -> Iterator[SignalHandler]:
    """Record stop signals until the block is left, whatever the main thread does meanwhile.

    The callbacks run in another thread. Signals that this process ignores stay ignored. Only the main thread may enter
    the block.

    Args:
        on_stop: called at the first signal
        on_kill: called at each signal that comes more than a second after the first

    Yields:
        the handler, which has recorded every signal by the time the block has been left
    """
    handler = SignalHandler(on_stop, on_kill)
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def listen() -> None:
        while number := reading.recv(1):
            if number[0] in STOP_SIGNALS:  # the interpreter writes all that have a handler
                handler.handle(number[0])
        reading.close()

    thread = Thread(target=listen, daemon=True)
    thread.start()
    accepted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous_fd = signal.set_wakeup_fd(writing.fileno())
    try:
        with _installed(accepted, lambda number, frame: None):  # without a handler nothing is written
            yield handler
    finally:
        signal.set_wakeup_fd(previous_fd)
        writing.shutdown(socket.SHUT_WR)  # ends the thread, after it has read what was written
        thread.join()
        writing.close()


@contextmanager
def raise_on_stop_signal() -> Iterator[None]:
    """Raise Terminated at a stop signal until the block is left; Control-C stays a KeyboardInterrupt."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    with _installed((number for number in STOP_SIGNALS if number != signal.SIGINT), terminate):
        yield


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Hold stop signals back until the block is left. Processes that are started in it never receive them."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def reraise_signal(number: signal.Signals) -> NoReturn:
    """Stop after this signal: by the handler that Python or a batch system has set for it, else by Terminated."""
    if callable(signal.getsignal(number)):
        signal.raise_signal(number)
    raise Terminated


def hard_exit() -> NoReturn:
    """End this process at once, without cleaning up or saving."""
    os._exit(1)


@contextmanager
def _installed(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle these signals so until the block is left."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
