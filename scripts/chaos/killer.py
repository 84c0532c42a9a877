"""Kill workers of a run, one planned kill after the other, and let it make progress in between.

The trainer gives a run up that makes no progress in three starts. So at least one of two kills follows a complete save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from random import Random

from scripts.chaos.kills import SECONDS_OF_A_START, Kill, Kind
from scripts.chaos.marks import Mark
from scripts.chaos.watch import Watched

STARTS_AT_A_PLACE = 2
SECONDS_OF_TRAINING = 3  # the range of random moments
SECONDS_BETWEEN_LOOKS_AT_DISK = 0.02
STAGES = ("tensors", "sync", "note")


class Killer:
    """Kills workers of one run.

    Attributes:
        start_seconds: the seconds from a start to the first step.
        sums: the names of the sums of a combination: "scalars", "vectors".
    """

    def __init__(self, run: Watched, random: Random, start_seconds: float, sums: Sequence[str]):
        self.run, self.random, self.start_seconds, self.sums = run, random, start_seconds, sums
        self.kills: list[Kill] = []
        self.place: tuple[str, ...] | None = None
        self.starts_here = 0
        self.ranks = range(len(run.marks))

    def work_off(self, plan: list[Kind]) -> Iterator[Kill]:
        """Kill as planned until the plan is empty or the run has ended; remove the kinds that were hit."""
        while plan and self.run.wait_for_start():
            self._note_start()
            meant = self._choose(plan)
            rank = self._wait_for(meant)
            kill = None if rank is None else self._kill(rank, meant)
            if kill is None:
                return
            self.kills.append(kill)
            if kill.kind in plan:
                plan.remove(kill.kind)
            yield kill

    def _note_start(self) -> None:
        place = self.run.place()
        self.starts_here = self.starts_here + 1 if place == self.place else 1
        self.place = place

    def _choose(self, plan: list[Kind]) -> Kind:
        """Return the first planned kind that is possible now, or a random moment if none is."""
        return next(filter(self._is_possible, plan), Kind.RANDOM)

    def _is_possible(self, kind: Kind) -> bool:
        if kind is Kind.ROW and not self.kills:
            return False
        return kind not in (Kind.START, Kind.ROW) or not self._must_come_further

    @property
    def _must_come_further(self) -> bool:
        """Whether the launcher would give the run up if its workers were killed without progress once more."""
        return self.starts_here >= STARTS_AT_A_PLACE

    def _wait_for(self, meant: Kind) -> int | None:
        """Wait for the moment to kill, and return the rank; None if the run has ended before."""
        if not self._wait_for_progress():
            return None
        if meant is Kind.SAVE:
            return self._wait_for_save()
        if meant is Kind.COMBINATION:
            return self._wait_for_combination()
        any_moment = SECONDS_OF_TRAINING + (0 if self._must_come_further else self.start_seconds)
        longest = {Kind.ROW: SECONDS_OF_A_START, Kind.START: self.start_seconds}.get(meant, any_moment)
        moment = time.monotonic() + self.random.uniform(0, 0.95 * longest)
        rank = 0 if meant is Kind.RANK_0 else self.random.choice(self.ranks)
        return rank if self.run.wait(lambda: time.monotonic() > moment) else None

    def _wait_for_save(self) -> int | None:
        stage, level = self.random.choice(STAGES), self.random.choice(("round checkpoint", "mid-round checkpoint"))

        def fits(mark: Mark) -> bool:
            if not mark.saving.endswith(f": {stage}") or ("/step-" in mark.saving) != (level == "mid-round checkpoint"):
                return False
            return stage != "tensors" or self.run.bytes_aside(mark.saving) > 0

        return self._wait_for_rank(fits)

    def _wait_for_combination(self) -> int | None:
        stage = self.random.choice(self.sums)

        def fits(mark: Mark) -> bool:
            return mark.doing.startswith("combining") and mark.doing.endswith(stage)

        return self._wait_for_rank(fits)

    def _wait_for_rank(self, fits: Callable[[Mark], bool]) -> int | None:
        """Wait until the condition holds for some ranks, and return one of them."""
        found: list[int] = []

        def look() -> bool:
            found.extend(rank for rank, pid in self.run.workers().items() if fits(self.run.mark(rank, pid)))
            return bool(found)

        return self.random.choice(found) if self.run.wait(look) else None

    def _wait_for_progress(self) -> bool:
        """Wait until another kill does not end the run; return False if the run has ended."""
        if not self._must_come_further:
            return True
        return self.run.wait(lambda: self.run.place() != self.place, SECONDS_BETWEEN_LOOKS_AT_DISK)

    def _kill(self, rank: int, meant: Kind) -> Kill | None:
        struck = self.run.kill(rank)
        if struck is None:
            return None
        pid, mark = struck
        now = time.monotonic()
        age, aside = now - self.run.born[pid], self.run.bytes_aside(mark.saving)
        return Kill(now - self.run.began, meant, rank, pid, age, mark, aside, len(self.kills))
