"""Strikes: who is struck and how, when, and what it was doing then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from scripts.chaos.kills import deal, shares
from scripts.chaos.marks import Mark


class Kind(StrEnum):
    """A strike. A launch is killed by SIGKILL to all its processes, preempted by SIGTERM, paused by SIGSTOP."""

    SITE = "a site is killed"
    RANK = "a rank of a site is killed"
    COORDINATOR = "the coordinator is killed"
    BOTH = "a site and the coordinator are killed"
    AWAY = "the coordinator is killed, and stays away"
    PREEMPTED_SITE = "a site is preempted"
    PREEMPTED_COORDINATOR = "the coordinator is preempted"
    PAUSED_SITE = "a site is paused"
    PAUSED_COORDINATOR = "the coordinator is paused"


KILLS = {Kind.SITE: 6, Kind.RANK: 4, Kind.COORDINATOR: 6, Kind.BOTH: 3, Kind.AWAY: 1}  # of twenty
# Beside twenty kills.
OTHERS = {
    Kind.PREEMPTED_SITE: 2,
    Kind.PREEMPTED_COORDINATOR: 2,
    Kind.PAUSED_SITE: 2,
    Kind.PAUSED_COORDINATOR: 2,
}

# The moments of strikes, by what the victim is doing.
MOMENTS: tuple[Callable[[Mark], bool], ...] = (
    lambda mark: True,
    lambda mark: mark.steps == 0,
    lambda mark: mark.doing.endswith(("meeting", "gathering", "publishing")),
    lambda mark: mark.saving.endswith((": tensors", ": sync", ": note")),
)


@dataclass(frozen=True)
class Strike:
    """A strike that has happened.

    Attributes:
        seconds: since the launch of the federation.
        kind: who was struck, and how.
        victim: the name of the member.
        mark: what its rank was doing that was struck, or the first of them.
    """

    seconds: float
    kind: Kind
    victim: str
    mark: Mark

    def __str__(self) -> str:
        hit = f"step {self.mark.steps}, {self.mark.doing}{self.mark.saving and '; '}{self.mark.saving}"
        return f"{self.seconds:6.1f} s  {self.kind:<41}  {self.victim:<11}  {hit}"


def plan(kills: int, cases: Iterable[str], random: Random) -> dict[str, list[Kind]]:
    """Distribute this number of kills, and other strikes beside them, over the cases, in random order."""
    others = kills * sum(OTHERS.values()) // sum(KILLS.values())
    return deal(shares(kills, KILLS) | shares(others, OTHERS), cases, random)
