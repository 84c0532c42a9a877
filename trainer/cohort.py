"""Who takes part in a round, and which silo trains whom: pure functions, equal on every rank, so nothing is sent."""

from __future__ import annotations

import csv
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from trainer.randomness import Tag, derive, numpy_generator


@dataclass(frozen=True)
class Round:
    """One tick of the shared clock: its index, the seed of the run, and the clients that take part, ascending."""

    index: int
    seed: int
    cohort: tuple[int, ...]

    def seed_for(self, *tags: Tag) -> int:
        """The seed of a random stream of this round."""
        return derive(self.seed, "round", self.index, *tags)

    def generator(self, *tags: Tag) -> torch.Generator:
        """A CPU generator of a random stream of this round."""
        return torch.Generator().manual_seed(self.seed_for(*tags))


class Cohort(Protocol):
    """Abstract: draws the clients of a round."""

    def draw(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        """The clients of round `index`, ascending."""
        ...


@dataclass(frozen=True)
class All:
    """Every client, every round."""

    def draw(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        return tuple(range(clients))


@dataclass(frozen=True)
class Sample:
    """`size` clients a round, drawn uniformly without replacement (McMahan et al. 2017, arXiv 1602.05629)."""

    size: int

    def draw(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        if not 0 < self.size <= clients:
            raise ValueError(
                f"cohort.size={self.size} cannot be drawn from {clients} clients.\n  valid: 1 to {clients}"
            )
        chosen = numpy_generator(seed, "cohort", index).choice(clients, self.size, replace=False)
        return tuple(sorted(chosen.tolist()))


@dataclass(frozen=True)
class Trace:
    """The clients that are there, as a file tells when they `join` and `leave`; `size` of them drawn if there are more.

    The file is CSV with the columns round, client and event: from that round on (the first is 1) the client is there,
    or is not. Clients that join in no line are there from the start. Raises ValueError for a line that says otherwise.
    """

    file: Path
    size: int | None = None

    def draw(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        there = self._there(clients, index)
        if self.size is None or self.size >= len(there):
            return there
        chosen = numpy_generator(seed, "cohort", index).choice(there, self.size, replace=False)
        return tuple(sorted(chosen.tolist()))

    def _there(self, clients: int, index: int) -> tuple[int, ...]:
        there = set(range(clients)) - {client for _, client, event in self._events if event == "join"}
        for round, client, event in self._events:
            if client >= clients:
                raise ValueError(f"cohort.file={self.file} names client {client}.\n  valid: 0 to {clients - 1}")
            if round <= index + 1:
                (there.add if event == "join" else there.discard)(client)
        return tuple(sorted(there))

    @cached_property
    def _events(self) -> list[tuple[int, int, str]]:
        """Round, client and event of each line, in the order of the rounds."""
        try:
            with open(self.file, newline="") as file:
                lines = list(csv.DictReader(file, skipinitialspace=True))
        except OSError as error:
            raise ValueError(f"cohort.file={self.file}: {error.strerror}") from error
        return sorted((self._event(number, line) for number, line in enumerate(lines, 2)), key=lambda event: event[0])

    def _event(self, number: int, line: dict[str, str]) -> tuple[int, int, str]:
        try:
            round, client, event = int(line["round"]), int(line["client"]), line["event"].strip()
        except (KeyError, TypeError, ValueError, AttributeError):
            round, client, event = -1, -1, ""
        if round < 1 or client < 0 or event not in ("join", "leave"):
            raise ValueError(
                f"cohort.file={self.file}, line {number}: {','.join(map(str, line.values()))}\n"
                "  valid: columns round (from 1), client (from 0), event (join or leave)"
            )
        return round, client, event


def assign(clients: Sequence[int], sizes: Sequence[int], silo_sizes: Sequence[int]) -> list[list[int]]:
    """The clients that each silo trains, so that silos finish at about the same time.

    The largest client first, each to the silo that would finish it earliest, in examples a replica. `sizes` are the
    numbers of examples by client. A silo's clients come in ascending order.
    """
    loads = [(0.0, silo) for silo in range(len(silo_sizes))]
    assigned: list[list[int]] = [[] for _ in silo_sizes]
    for client in sorted(clients, key=lambda client: (-sizes[client], client)):
        load, silo = heapq.heappop(loads)
        assigned[silo].append(client)
        heapq.heappush(loads, (load + sizes[client] / silo_sizes[silo], silo))
    return [sorted(mine) for mine in assigned]
