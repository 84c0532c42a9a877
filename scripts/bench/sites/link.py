"""The share of a shaped link that a message between a site and the coordinator uses, and what the rest is lost to."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

from scripts.bench.sites.processes import Process, options_of, start_all
from scripts.network_namespaces import LINK, Host, new_hosts

BITS = 8
PORT = 7070
WARM_UP_BYTES = 1 << 20  # TCP and HTTP/2 have found their windows after it


@dataclass(frozen=True)
class Case:
    """A rate in the notation of tc(8), the same in bits a second, the bytes of a message, and the share to reach."""

    rate: str
    bits: float
    size: int
    goal: float


CASES = [Case("100mbit", 1e8, 16_000_000, 0.93), Case("1gbit", 1e9, 40_000_000, 0.90)]


@dataclass(frozen=True)
class Use:
    """The use of a link in one direction: medians over the repeats.

    Attributes:
        rate: of the link.
        direction: `up`, to the coordinator, or `down`.
        goodput: bytes of tensors a second, as a share of the rate.
        framing: the share of the rate that headers took: TLS, HTTP/2, TCP, IP and Ethernet.
        idle: the share in which the link had nothing to send.
        processor: seconds of both ends, of all threads.
        python: those of Python's threads, of which gRPC's are none.
        seconds: from the first byte to the last.
        goal: of goodput.
    """

    rate: str
    direction: str
    goodput: float
    framing: float
    idle: float
    processor: float
    python: float
    seconds: float
    goal: float


@dataclass(frozen=True)
class Pair:
    """A coordinator and a site on hosts of their own, joined by a link of the case's rate."""

    case: Case
    receiver: Process
    sender: Process
    hosts: list[Host]

    def transfer(self, direction: str, index: int, size: int) -> Use:
        """Send this many bytes of tensors in a round of this index."""
        command = f"{direction} {index} {size}"
        source = self.hosts[1 if direction == "up" else 0]
        before = _sent(source)
        self.receiver.tell(command)
        sent = self.sender.ask(command)
        came = self.receiver.answer()
        wire = _sent(source) - before
        seconds = came["came"] - sent["began"] if direction == "up" else sent["ended"] - came["came"]
        capacity = self.case.bits / BITS * seconds
        return Use(
            rate=self.case.rate,
            direction=direction,
            goodput=size / capacity,
            framing=(wire - size) / capacity,
            idle=1 - wire / capacity,
            processor=sent["processor"] + came["processor"],
            python=sent["python"] + came["python"],
            seconds=seconds,
            goal=self.case.goal,
        )


def measure_links(cases: list[Case], repeats: int, folder: str) -> list[Use]:
    """Measure both directions of each case. It needs root."""
    return [use for case in cases for use in _measure(case, repeats, folder)]


def _measure(case: Case, repeats: int, folder: str) -> list[Use]:
    with _start(case, folder) as pair:
        for process in (pair.receiver, pair.sender):
            process.answer()  # they have met
        uses: dict[str, list[Use]] = {"up": [], "down": []}
        rounds = count()
        for direction in uses:
            pair.transfer(direction, next(rounds), WARM_UP_BYTES)
        for _ in range(repeats):
            for direction, found in uses.items():
                found.append(pair.transfer(direction, next(rounds), case.size))
    return [_middle(found) for found in uses.values()]


@contextmanager
def _start(case: Case, folder: str) -> Iterator[Pair]:
    """Start the processes of a case."""
    with new_hosts(2) as hosts:
        for host in hosts:
            host.limit(case.rate)
        options = options_of(folder, ["a"]) | {"address": f"{hosts[0].address}:{PORT}"}
        roles: list[tuple[str, dict[str, Any]]] = [("receiver", options), ("sender", {**options, "name": "a"})]
        with start_all(roles, [host.inside for host in hosts]) as (receiver, sender):
            yield Pair(case, receiver, sender, hosts)


def _sent(host: Host) -> int:
    """Return the bytes that the shaper of a host has let through so far, with the headers of all segments."""
    command = host.network.inside("tc", "-s", "-j", "qdisc", "show", "dev", LINK)
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(shown)[0]["bytes"]


def _middle(uses: list[Use]) -> Use:
    """Return the repeat of median goodput."""
    goodput = median(use.goodput for use in uses)
    return min(uses, key=lambda use: abs(use.goodput - goodput))
