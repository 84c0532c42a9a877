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
SECONDS_APART = 1  # terminals and batch systems often deliver a signal twice
SECONDS_BETWEEN_BEATS = 0.5
SECONDS_OF_SILENCE = 5  # after which a rank is taken to be stopped
SECONDS_TO_ANSWER = 2  # for the store: calls to one that cannot be reached take a quarter of an hour


@contextmanager
def heed_stop_signals(first: Callable[[], None], again: Callable[[], None]) -> Iterator[None]:
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
            elif time.monotonic() - since > SECONDS_APART:
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


class Pulse:
    """Twice a second: says what this rank does, and hears whether any rank has been told to leave."""

    def __init__(self, store: Store, rank: int, doing: Callable[[], str]):
        self.store, self.rank, self.doing = store, rank, doing
        self.ended = Event()

    @contextmanager
    def beating(self, is_leaving: Callable[[], bool], leave: Callable[[], None]) -> Iterator[None]:
        """Beats until the block is left; `leave` is called when another rank `is_leaving`."""

        def beat() -> None:
            told = False
            while not self.ended.wait(SECONDS_BETWEEN_BEATS):
                try:
                    self.store.set(f"beat/{self.rank}", f"{time.time()} {self.doing()}")
                    if is_leaving() and not told:
                        self.store.set("leave", "")
                        told = True
                    elif not is_leaving() and self.store.check(["leave"]):
                        leave()
                except RuntimeError:  # the store is gone, and so is its launcher: signals tell the rest
                    return

        thread = Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.ended.set()
            thread.join(SECONDS_TO_ANSWER)

    def of_all(self, world_size: int) -> str:
        """What all ranks did when they were last heard from, those that fell silent first, if that can be asked."""
        told: list[str] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the store is gone
                told.append(self._ask(world_size))

        thread = Thread(target=ask, daemon=True)
        thread.start()
        thread.join(SECONDS_TO_ANSWER)
        return told[0] if told else "what the others do is not known: the host of rank 0 does not answer"

    def _ask(self, world_size: int) -> str:
        now, silent, others = time.time(), [], {}
        for rank in range(world_size):
            if not self.store.check([f"beat/{rank}"]):
                silent.append(f"rank {rank} was never heard from")
                continue
            moment, doing = self.store.get(f"beat/{rank}").decode().split(" ", 1)
            if now - float(moment) > SECONDS_OF_SILENCE:
                silent.append(f"rank {rank} has not been heard from for {now - float(moment):.0f} s; {doing}")
            else:
                others.setdefault(doing, []).append(rank)
        return "\n".join([*silent, *(f"ranks {ranks}: {doing}" for doing, ranks in others.items())])


def exit_at_once() -> None:
    """Ends this process without another word or save."""
    os._exit(1)
