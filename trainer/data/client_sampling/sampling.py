"""Who takes part in a round, and which silo trains whom: pure functions, equal on every rank, so nothing is sent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from trainer.data.client_sampling.availability_trace import Event, read_events
from trainer.utils.seeding import numpy_generator


class ClientSampler(Protocol):
    """Abstract: draws the clients of a round.

    Attributes:
        takes_all: whether every client takes part in every round.
    """

    @property
    def takes_all(self) -> bool: ...

    def round_size(self, clients: int) -> int:
        """Return how many of this number of clients a round has, at most."""
        ...

    def fingerprint(self) -> str:
        """Return what tells the presence of clients from that in other runs; empty if all are always present."""
        ...

    def sample(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        """The clients of round `index`, ascending."""
        ...


@dataclass(frozen=True)
class AllClients:
    """Every client, every round."""

    takes_all = True

    def round_size(self, clients: int) -> int:
        return clients

    def fingerprint(self) -> str:
        return ""

    def sample(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        return tuple(range(clients))


@dataclass(frozen=True)
class UniformSampler:
    """`clients_per_round` clients, drawn uniformly without replacement (McMahan et al. 2017, arXiv 1602.05629)."""

    clients_per_round: int
    takes_all = False

    def round_size(self, clients: int) -> int:
        return self.clients_per_round

    def fingerprint(self) -> str:
        return ""

    def sample(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        if not 0 < self.clients_per_round <= clients:
            raise ValueError(
                f"client_sampling.clients_per_round={self.clients_per_round} cannot be drawn from {clients} clients.\n"
                f"  valid: 1 to {clients}"
            )
        chosen = numpy_generator(seed, "cohort", index).choice(clients, self.clients_per_round, replace=False)
        return tuple(sorted(chosen.tolist()))


@dataclass(frozen=True)
class AvailabilityTrace:
    """The clients that are there, as a file tells when they `join` and `leave`; `clients_per_round` drawn if more.

    The file is CSV with the columns round, client and event: from that round on (the first is 1) the client is there,
    or is not. Before its first line a client is there if that line says that it leaves; one without a line always is.
    Raises ValueError for a file that says otherwise.
    """

    file: Path
    clients_per_round: int | None = None
    takes_all = False

    def round_size(self, clients: int) -> int:
        return clients if self.clients_per_round is None else min(self.clients_per_round, clients)

    def fingerprint(self) -> str:
        return str(self.events)

    def sample(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        if self.clients_per_round is not None and self.clients_per_round < 1:
            raise ValueError(
                f"client_sampling.clients_per_round={self.clients_per_round}\n  valid: a whole number from 1, or null"
            )
        there = self._available(clients, index)
        if self.clients_per_round is None or self.clients_per_round >= len(there):
            return there
        chosen = numpy_generator(seed, "cohort", index).choice(there, self.clients_per_round, replace=False)
        return tuple(sorted(chosen.tolist()))

    @cached_property
    def events(self) -> list[Event]:
        """The lines of the file, in the order of the rounds."""
        return sorted(read_events(Path(self.file)), key=lambda event: event.round)

    def _available(self, clients: int, index: int) -> tuple[int, ...]:
        there, told = set(range(clients)), set()
        for event in self.events:
            if event.client >= clients:
                raise ValueError(
                    f"client_sampling.file={self.file}, line {event.line}: client {event.client}\n"
                    f"  valid: 0 to {clients - 1}"
                )
            if event.joins and event.client not in told:
                there.discard(event.client)
            told.add(event.client)
        for event in self.events:
            if event.round <= index + 1:
                (there.add if event.joins else there.discard)(event.client)
        return tuple(sorted(there))
