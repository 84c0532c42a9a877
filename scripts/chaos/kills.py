"""The kinds of kills, the number of each, and whether a kill hit its target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Protocol, TypeVar

from scripts.chaos.marks import Mark


class Kind(StrEnum):
    """The target of a kill."""

    SAVE = "inside a save"
    COMBINATION = "inside a combination"
    RANK_0 = "rank 0"
    START = "at start-up"
    ROW = "two in a row"
    RANDOM = "at a random moment"


IN_TWENTY = {Kind.SAVE: 5, Kind.COMBINATION: 3, Kind.RANK_0: 5, Kind.START: 3, Kind.ROW: 2, Kind.RANDOM: 2}
SECONDS_OF_A_START = 1.0  # a younger worker is still starting

Target = TypeVar("Target")


class Hit(Protocol):
    """A process that was struck, and what it was doing."""

    @property
    def kind(self) -> StrEnum: ...

    @property
    def mark(self) -> Mark: ...


@dataclass(frozen=True)
class Kill:
    """A kill, and what the worker was doing.

    Attributes:
        seconds: the time since the launch of the run.
        meant: the kind that was intended.
        age: the age of the worker in seconds.
        mark: the activity of the worker when it died.
        bytes_aside: the bytes of the file that it was writing.
        start: the number of earlier restarts.
    """

    seconds: float
    meant: Kind
    rank: int
    pid: int
    age: float
    mark: Mark
    bytes_aside: int
    start: int

    @property
    def kind(self) -> Kind:
        """The intended kind if it was hit, otherwise a random moment."""
        return self.meant if self._is(self.meant) else Kind.RANDOM

    @property
    def is_inside_a_save(self) -> bool:
        """Whether the first byte was written, and the last file was not yet renamed."""
        stage = self.mark.saving.rpartition(": ")[2]
        return stage in ("sync", "note") or (stage == "tensors" and self.bytes_aside > 0)

    @property
    def is_inside_a_combination(self) -> bool:
        return self.mark.doing.startswith("combining")

    def _is(self, kind: Kind) -> bool:
        young = self.age < SECONDS_OF_A_START
        return {
            Kind.SAVE: self.is_inside_a_save,
            Kind.COMBINATION: self.is_inside_a_combination,
            Kind.RANK_0: self.rank == 0,
            Kind.START: young or self.mark.steps == 0,
            Kind.ROW: young and self.start > 0,
            Kind.RANDOM: True,
        }[kind]

    def __str__(self) -> str:
        saving = f"; {self.mark.saving}" if self.mark.saving else ""
        aside = f", {self.bytes_aside:,} bytes" if self.bytes_aside else ""
        hit = f"step {self.mark.steps}, {self.mark.doing}{saving}{aside}"
        return f"{self.seconds:7.1f} s  {self.kind:<20}  rank {self.rank}  pid {self.pid:<7}  {hit}"


def plan(kills: int, cases: Iterable[str], random: Random) -> dict[str, list[Kind]]:
    """Distribute this number of kills over the cases, and return the kinds of each case in random order."""
    return deal(shares(kills, IN_TWENTY), cases, random)


def deal(counts: Mapping[Target, int], cases: Iterable[str], random: Random) -> dict[str, list[Target]]:
    """Distribute this number of each kind over the cases, and return the kinds of each case in random order."""
    kinds, names = [kind for kind, count in counts.items() for _ in range(count)], list(cases)
    dealt = {name: kinds[place :: len(names)] for place, name in enumerate(names)}
    for each in dealt.values():
        random.shuffle(each)
    return dealt


def shares(kills: int, in_twenty: Mapping[Target, int]) -> dict[Target, int]:
    """Return the number of kills of each kind: in proportion, with the largest remainders rounded up.

    >>> [shares(20, IN_TWENTY)[kind] for kind in (Kind.SAVE, Kind.START)]
    [5, 3]
    """
    total = sum(in_twenty.values())
    counts = {kind: kills * count // total for kind, count in in_twenty.items()}
    by_remainder = sorted(in_twenty, key=lambda kind: -(kills * in_twenty[kind] % total))
    for kind in by_remainder[: kills - sum(counts.values())]:
        counts[kind] += 1
    return counts
