"""Measure how soon others go on without a site that vanishes, and with it when it returns.

    python -m scripts.chaos.sites --times 5

A coordinator and three sites train, each in a network of its own where the system permits that. A site is killed, falls
silent, or has its link cut. The time counts from there to the first round that the others have combined and evaluated
without it, less the grace. Then it is started again, continues, or has its link back: the time counts to the first
round with it. The coordinator is killed, too, and started again at once.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from scripts.chaos.sites.cases import COMMON, COORDINATOR, EXAMPLES, trees, write_files
from scripts.chaos.sites.federation import Federation, Member, under_way
from scripts.network_namespaces import Host, new_hosts, why_not

SITES = dict.fromkeys(EXAMPLES, 1)  # of a rank each
VICTIM = "rome"
GRACE_SECONDS = 2.0
SECONDS_TO_WAIT = 90.0
ROUNDS_BETWEEN = 3
OVERRIDES = (
    *(override for override in COMMON if not override.startswith(("site.", "schedule", "round.", "checkpoint."))),
    *("algorithm=fedavg", "rounds=1000000", "round.steps=5"),
    *("checkpoint.every_rounds=20", "checkpoint.every_seconds=null"),
    *(f"site.grace_seconds={GRACE_SECONDS}", "site.min_members=1", "site.retry_seconds=60"),
)


@dataclass(frozen=True)
class Absence:
    """A way to vanish and to return.

    Attributes:
        name: for people.
        vanish: makes the victim vanish.
        come_back: makes it return.
    """

    name: str
    vanish: Callable[[Member], object]
    come_back: Callable[[Member], object]


class Measured:
    """A federation whose rounds are watched."""

    def __init__(self, federation: Federation):
        self.federation = federation
        self.victim, self.coordinator = federation.members[VICTIM], federation.members[COORDINATOR]

    def absence(self, absence: Absence) -> tuple[float, float]:
        """Return the seconds to the others' next round, less the grace, and to the next round with the victim."""
        self._wait_for_rounds(ROUNDS_BETWEEN, sites=3)
        began = time.monotonic()
        absence.vanish(self.victim)
        self._wait_for_rounds(1, sites=2)
        went_on = time.monotonic() - began - GRACE_SECONDS
        self._wait_for_rounds(ROUNDS_BETWEEN, sites=2)
        began = time.monotonic()
        absence.come_back(self.victim)
        self._wait_for_rounds(1, sites=3)
        return went_on, time.monotonic() - began

    def replacement(self) -> float:
        """Return the seconds from the death of the coordinator, which is started again at once, to its next round."""
        self._wait_for_rounds(ROUNDS_BETWEEN, sites=3)
        newest, began = self._newest(), time.monotonic()
        self.coordinator.kill()
        self._wait(lambda: self._newest() > newest)
        return time.monotonic() - began

    def _wait_for_rounds(self, count: int, sites: int) -> None:
        """Wait for `count` further rounds in which this number of sites has trained."""
        newest = self._newest()
        self._wait(lambda: len([n for n, trained in self._rounds() if n > newest and trained == sites]) >= count)

    def _newest(self) -> int:
        return max((number for number, _ in self._rounds()), default=0)

    def _rounds(self) -> list[tuple[int, int]]:
        return [(int(line["round"]), int(line["clients/trained"])) for line in self.coordinator.logged()]

    def _wait(self, condition: Callable[[], bool]) -> None:
        came = self.federation.wait(condition, SECONDS_TO_WAIT)
        assert came, self.federation.failures or f"no such round in {SECONDS_TO_WAIT} s: {self.coordinator.run.log}"


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="how often a site vanishes in each way")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/absences"), help="a new folder, removed afterwards"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with _hosts() as hosts:
        write_files(options.folder / "files", SITES)
        host = hosts[COORDINATOR].address if hosts else "127.0.0.1"
        prepare = {name: each.network.enter for name, each in hosts.items()}
        made = trees(OVERRIDES, SITES, options.folder / "files", options.folder, host)
        with under_way(made, options.folder, prepare) as federation:
            measured = Measured(federation)
            for absence in _absences(hosts):
                seconds = [measured.absence(absence) for _ in range(options.times)]
                went_on, came_back = zip(*seconds, strict=True)
                print(f"{absence.name}: the others go on {_shown(went_on)} after the grace", flush=True)
                print(f"{absence.name}: is counted again {_shown(came_back)} later", flush=True)
            seconds = [measured.replacement() for _ in range(options.times)]
            print(f"the coordinator is killed: the next round {_shown(seconds)} later", flush=True)
    shutil.rmtree(options.folder)
    return 0


@contextmanager
def _hosts() -> Iterator[Mapping[str, Host]]:
    """Make a host for each member; none if the system does not permit that."""
    if reason := why_not():
        print(f"all on one host, and no link is cut: {reason}")
        yield {}
        return
    with new_hosts(1 + len(SITES)) as made:
        yield dict(zip([COORDINATOR, *SITES], made, strict=True))


def _absences(hosts: Mapping[str, Host]) -> Iterator[Absence]:
    yield Absence("a site is killed", lambda victim: victim.kill(float("inf")), _start_again)
    yield Absence("a site falls silent", lambda victim: victim.pause(), lambda victim: victim.go_on())
    if hosts:
        host = hosts[VICTIM]
        yield Absence("the link of a site is cut", lambda victim: host.unplug(), lambda victim: host.plug())


def _start_again(victim: Member) -> None:
    victim.absent_until = 0.0


def _shown(seconds: tuple[float, ...] | list[float]) -> str:
    return f"{median(seconds):.1f} s (at most {max(seconds):.1f})"


if __name__ == "__main__":
    sys.exit(main())
