"""How a process hears from outside while it trains: whether to save or to leave, and where it says that it is.

Inside a silo all replicas must act on the same step: they vote, without waiting for each other. Silos never do.
"""

from __future__ import annotations

from enum import IntEnum
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from trainer.distributed import collectives
from trainer.distributed.topology import Topology

if TYPE_CHECKING:
    from trainer.algorithms.client_result import Work

SECONDS_BETWEEN_VOTES = 0.25


class Wish(IntEnum):
    """What to do after a step; of several wishes the greatest counts."""

    GO_ON = 0
    SAVE = 1
    FINISH = 2  # the round: its time is over
    LEAVE = 3


class Contact:
    """What this process was told, and what it is doing. Signals and threads write here, the loop reads.

    save_seconds  the time between saves inside a round; None: there are none
    max_seconds   the time after which to leave; None: never
    finish_at     when the round is over for this silo, whatever is left of it to do
    stop_at       when the time of the whole run is over, which then ends with the round
    """

    def __init__(self, save_seconds: float | None = None, max_seconds: float | None = None):
        began = perf_counter()
        self.save_seconds = float("inf") if save_seconds is None else save_seconds
        self.leave_at = float("inf") if max_seconds is None else began + max_seconds
        self.saved_at = began
        self.finish_at = self.stop_at = float("inf")
        self.is_leaving = False
        self.phase, self.work = "starting", None

    def leave(self) -> None:
        """Asks to leave at the next opportunity. Safe in any thread."""
        self.is_leaving = True

    def wish(self) -> Wish:
        """What this process wishes now."""
        now = perf_counter()
        if self.is_leaving or now > self.leave_at:
            return Wish.LEAVE
        if now > self.finish_at:
            return Wish.FINISH
        return Wish.SAVE if now - self.saved_at > self.save_seconds else Wish.GO_ON

    def saved(self) -> None:
        """The time to the next save starts anew."""
        self.saved_at = perf_counter()

    def at(self, phase: str, work: Work | None = None) -> None:
        """Notes what is being done, for the heartbeat."""
        self.phase, self.work = phase, work

    def whereabouts(self) -> str:
        """What is being done, for people: "round 3: training client 1, step 17"."""
        work = self.work
        return f"{self.phase} client {work.client}, step {work.steps}" if work else self.phase


class Vote:
    """What the replicas of a silo do after a step: the greatest wish among them, the same on all, on the same step.

    A vote is one small all-reduce every quarter of a second, begun after one step and read some steps later, so that
    nobody waits for it. Replica 0 says how many steps that is.
    """

    def __init__(self, topology: Topology, contact: Contact):
        self.topology, self.contact = topology, contact
        self.period = self.countdown = 1
        self.began = perf_counter()
        self.ballot, self.pending = torch.zeros(2, dtype=torch.int64), None

    def after_step(self) -> Wish:
        """What all replicas do now. Every one calls it after every step."""
        if self.topology.num_replicas == 1:
            return self._obey(self.contact.wish())
        self.countdown -= 1
        return Wish.GO_ON if self.countdown else self._next()

    def close(self) -> None:
        """Ends the vote that is under way, which all replicas have begun: what it says is of a round that is over."""
        if self.pending:
            self.pending.wait()
            self.pending = None
        self.period = self.countdown = 1
        self.began = perf_counter()

    def _next(self) -> Wish:
        agreed, now = Wish.GO_ON, perf_counter()
        steps = max(1, round(SECONDS_BETWEEN_VOTES * self.period / (now - self.began)))
        if self.pending:
            self.pending.wait()
            wish, self.period = self.ballot.tolist()
            agreed = self._obey(Wish(wish))
        self.began, self.countdown = now, self.period
        self.ballot = torch.tensor([self.contact.wish(), steps if self.topology.is_leader else 0])
        self.pending = collectives.start_maximum_in_silo(self.ballot, self.topology)
        return agreed

    def _obey(self, wish: Wish) -> Wish:
        if wish is Wish.SAVE:
            self.contact.saved()
        return wish
