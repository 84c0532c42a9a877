"""Heartbeats of the workers through the store, and stop requests from rank to rank.

They are sent and read in a thread: the main one may wait in a collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from trainer.distributed.store import SignedStore

HEARTBEAT_INTERVAL_SECONDS = 0.5
HEARTBEAT_TIMEOUT_SECONDS = 5  # after which a rank is taken to be stopped
RESPONSE_TIMEOUT_SECONDS = 2  # for the store: calls to one that cannot be reached take a quarter of an hour


class Heartbeat:
    """Publishes the activity of this rank twice a second, and watches for a stop request of any rank.

    Args:
        store: that all ranks of this start of the world share, for the heartbeat alone
        rank: the global rank
        activity: a few words about what this rank is doing
    """

    def __init__(self, store: SignedStore, rank: int, activity: Callable[[], str]):
        self.store, self.rank, self.activity = store, rank, activity
        self.stopped = Event()

    @contextmanager
    def running(self, stop_requested: Callable[[], bool], request_stop: Callable[[], None]) -> Iterator[None]:
        """Beat until the block is left.

        Args:
            stop_requested: whether this rank was asked to stop, which all others then learn
            request_stop: called when another rank was asked to stop
        """

        def beat() -> None:
            announced = False
            while not self.stopped.wait(HEARTBEAT_INTERVAL_SECONDS):
                try:
                    self.store.set(f"beat/{self.rank}", f"{time.time()} {self.activity()}")
                    if stop_requested() and not announced:
                        self.store.set("leave", "")
                        announced = True
                    elif not stop_requested() and self.store.read("leave") is not None:
                        request_stop()
                except RuntimeError:  # the store is gone with rank 0: the launchers, or the collectives, notice
                    return

        thread = Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.stopped.set()
            thread.join(RESPONSE_TIMEOUT_SECONDS)

    def activities(self, world_size: int) -> str:
        """Describe the last known activity of all ranks, silent ones first, a line each."""
        answers: list[str] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the store is gone
                answers.append(self._describe(world_size))

        # A thread, because a call to a store that cannot be reached takes much longer than anybody would wait.
        thread = Thread(target=ask, daemon=True)
        thread.start()
        thread.join(RESPONSE_TIMEOUT_SECONDS)
        return answers[0] if answers else "what the others do is not known: rank 0 does not answer"

    def _describe(self, world_size: int) -> str:
        now, silent, others = time.time(), [], {}
        for rank in range(world_size):
            beat = self.store.read(f"beat/{rank}")
            if beat is None:
                silent.append(f"rank {rank} was never heard from")
                continue
            moment, activity = beat.split(" ", 1)
            if now - float(moment) > HEARTBEAT_TIMEOUT_SECONDS:
                silent.append(f"rank {rank} has not been heard from for {now - float(moment):.0f} s; {activity}")
            else:
                others.setdefault(activity, []).append(rank)
        return "\n".join([*silent, *(f"ranks {ranks}: {activity}" for activity, ranks in others.items())])
