"""A worker's word to the outside and back: signals in, a heartbeat out, and the wish to leave from rank to rank.

All of it in threads, because the main one may be waiting in a collective where no signal handler runs.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
MIN_SECONDS_BETWEEN_SIGNALS = 1  # terminals and batch systems often deliver a signal twice
HEARTBEAT_INTERVAL_SECONDS = 0.5
HEARTBEAT_TIMEOUT_SECONDS = 5  # after which a rank is taken to be stopped
RESPONSE_TIMEOUT_SECONDS = 2  # for the store: calls to one that cannot be reached take a quarter of an hour


@contextmanager
def handle_stop_signals(first: Callable[[], None], again: Callable[[], None]) -> Iterator[None]:
    """Until the block is left, a signal that asks for an end calls `first`; more than a second later, `again`.

    Both are called in a thread, at once, whatever the main thread does. The main thread must enter the block.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def listen() -> None:
        since = None
        while reading.recv(1):
            if since is None:
                since = time.monotonic()
                first()
            elif time.monotonic() - since > MIN_SECONDS_BETWEEN_SIGNALS:
                again()

    # The interpreter writes a byte as soon as a signal comes; the handlers are there only to make it do so.
    earlier = signal.set_wakeup_fd(writing.fileno())
    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in heeded}
    Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier)
        writing.close()  # the thread reads the end


class Heartbeat:
    """Twice a second: says what this rank does, and hears whether any rank has been told to leave."""

    def __init__(self, store: Store, rank: int, activity: Callable[[], str]):
        self.store, self.rank, self.activity = store, rank, activity
        self.stopped = Event()

    @contextmanager
    def running(self, stop_requested: Callable[[], bool], request_stop: Callable[[], None]) -> Iterator[None]:
        """Beats until the block is left; `request_stop` is called when another rank `stop_requested`."""

        def beat() -> None:
            told = False
            while not self.stopped.wait(HEARTBEAT_INTERVAL_SECONDS):
                try:
                    self.store.set(f"beat/{self.rank}", f"{time.time()} {self.activity()}")
                    if stop_requested() and not told:
                        self.store.set("leave", "")
                        told = True
                    elif not stop_requested() and self.store.check(["leave"]):
                        request_stop()
                except RuntimeError:  # the store is gone, and so is its launcher: signals tell the rest
                    return

        thread = Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.stopped.set()
            thread.join(RESPONSE_TIMEOUT_SECONDS)

    def activities(self, world_size: int) -> str:
        """What all ranks did when they were last heard from, those that fell silent first, if that can be asked."""
        told: list[str] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the store is gone
                told.append(self._ask(world_size))

        thread = Thread(target=ask, daemon=True)
        thread.start()
        thread.join(RESPONSE_TIMEOUT_SECONDS)
        return told[0] if told else "what the others do is not known: the host of rank 0 does not answer"

    def _ask(self, world_size: int) -> str:
        now, silent, others = time.time(), [], {}
        for rank in range(world_size):
            if not self.store.check([f"beat/{rank}"]):
                silent.append(f"rank {rank} was never heard from")
                continue
            moment, doing = self.store.get(f"beat/{rank}").decode().split(" ", 1)
            if now - float(moment) > HEARTBEAT_TIMEOUT_SECONDS:
                silent.append(f"rank {rank} has not been heard from for {now - float(moment):.0f} s; {doing}")
            else:
                others.setdefault(doing, []).append(rank)
        return "\n".join([*silent, *(f"ranks {ranks}: {doing}" for doing, ranks in others.items())])


def hard_exit() -> None:
    """Ends this process without another word or save."""
    os._exit(1)
