"""Who takes part in a round, and which silo trains whom: pure functions, equal on every rank, so nothing is sent."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from trainer.data.events import Event, read_events
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
    or is not. Before its first line a client is there if that line says that it leaves; one without a line always is.
    Raises ValueError for a file that says otherwise.
    """

    file: Path
    size: int | None = None

    def draw(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        if self.size is not None and self.size < 1:
            raise ValueError(f"cohort.size={self.size}\n  valid: a whole number from 1, or null")
        there = self._there(clients, index)
        if self.size is None or self.size >= len(there):
            return there
        chosen = numpy_generator(seed, "cohort", index).choice(there, self.size, replace=False)
        return tuple(sorted(chosen.tolist()))

    @cached_property
    def events(self) -> list[Event]:
        """The lines of the file, in the order of the rounds."""
        return sorted(read_events(Path(self.file)), key=lambda event: event.round)

    def _there(self, clients: int, index: int) -> tuple[int, ...]:
        there, told = set(range(clients)), set()
        for event in self.events:
            if event.client >= clients:
                raise ValueError(
                    f"cohort.file={self.file}, line {event.line}: client {event.client}\n  valid: 0 to {clients - 1}"
                )
            if event.joins and event.client not in told:
                there.discard(event.client)
            told.add(event.client)
        for event in self.events:
            if event.round <= index + 1:
                (there.add if event.joins else there.discard)(event.client)
        return tuple(sorted(there))


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
