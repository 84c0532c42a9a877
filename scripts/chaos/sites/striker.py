"""Strikes the members of a federation, one after the other, and lets it come further in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from random import Random

from scripts.chaos.sites.cases import COORDINATOR
from scripts.chaos.sites.federation import Federation, Member
from scripts.chaos.sites.strikes import MOMENTS, Kind, Strike

LONGEST_GAP = 2.0  # seconds between two strikes
LONGEST_WAIT = 3.0  # seconds for the moment of a strike
LONGEST_ABSENCE = 1.0  # seconds until a member that was killed is started again
SECONDS_AWAY = 7.0  # longer than sites try to reach the coordinator
LONGEST_PAUSE = 6.0  # seconds; a silent peer is given up earlier
SECONDS_TO_LEAVE = 30.0  # of a member that is preempted


class Striker:
    """Strikes a federation that is under way."""

    def __init__(self, federation: Federation, random: Random):
        self.federation, self.random = federation, random
        self.coordinator = federation.members[COORDINATOR]
        self.sites = [member for name, member in federation.members.items() if name != COORDINATOR]

    def work_off(self, planned: list[Kind], most: int) -> Iterator[Strike]:
        """Strike as planned, this often at most, while the run lasts; remove from the plan what was done."""
        for _ in range(most):
            gap = self.random.uniform(0, LONGEST_GAP)
            self.federation.wait(lambda: False, gap)
            struck = self._strike(planned[0]) if planned else None
            if struck is None:
                return
            planned.remove(struck.kind)
            yield struck

    def _strike(self, kind: Kind) -> Strike | None:
        """Strike at a random moment of a kind; return None if the victim has finished before."""
        is_coordinator = kind in (
            Kind.COORDINATOR,
            Kind.AWAY,
            Kind.PREEMPTED_COORDINATOR,
            Kind.PAUSED_COORDINATOR,
        )
        victim = self.coordinator if is_coordinator else self.random.choice(self.sites)
        rank = self.random.randrange(len(victim.run.marks)) if kind is Kind.RANK else 0
        moment = self.random.choice(MOMENTS)
        self.federation.wait(lambda: victim.is_up and moment(victim.mark(rank)), LONGEST_WAIT)
        if not self.federation.wait(lambda: victim.is_up, SECONDS_TO_LEAVE):
            return None
        strike = Strike(time.monotonic() - self.federation.began, kind, victim.name, victim.mark(rank))
        return strike if self._carry_out(kind, victim, rank) else None

    def _carry_out(self, kind: Kind, victim: Member, rank: int) -> bool:
        absence = self.random.uniform(0, LONGEST_ABSENCE)
        match kind:
            case Kind.RANK:
                return self.federation.wait(lambda: victim.kill_rank(rank), SECONDS_TO_LEAVE)
            case Kind.SITE | Kind.COORDINATOR:
                victim.kill(absence)
            case Kind.AWAY:
                victim.kill(SECONDS_AWAY)
            case Kind.BOTH:
                self.coordinator.kill(absence)
                victim.kill(absence)
            case Kind.PREEMPTED_SITE | Kind.PREEMPTED_COORDINATOR:
                starts = victim.starts
                victim.preempt()
                return self.federation.wait(lambda: victim.starts > starts, SECONDS_TO_LEAVE)
            case Kind.PAUSED_SITE | Kind.PAUSED_COORDINATOR:
                victim.pause()
                self.federation.wait(lambda: False, self.random.uniform(0, LONGEST_PAUSE))
                victim.go_on()
        return True
