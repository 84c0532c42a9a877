"""Who takes part in a round, and which silo trains whom: pure functions, equal on every rank, so nothing is sent."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
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
