"""Client samplers: which clients take part in a round.

Samplers are pure functions, equal on every rank, so that nothing is communicated.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainer.utils.seeding import numpy_generator

TRACE_COLUMNS = ("round", "client", "event")
VALID_TRACE = "\n  valid: CSV with the columns round (from 1), client (from 0) and event (join or leave)"


class ClientSampler(ABC):
    """Abstract: samples the clients of a round, as a pure function. A subclass needs `sample` alone.

    Attributes:
        name: for messages.
        takes_all: whether every client takes part in every round.
    """

    name = "custom"
    takes_all = False

    @abstractmethod
    def sample(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        """Return the clients of round `index`, ascending."""

    def round_size(self, clients: int) -> int:
        """Return how many of this number of clients a round has, at most."""
        return clients

    def fingerprint(self) -> str:
        """Return what identifies the availability of clients; empty if it does not depend on a file."""
        return ""


@dataclass(frozen=True)
class AllClients(ClientSampler):
    """Every client, every round."""

    name = "all"
    takes_all = True

    def sample(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        return tuple(range(clients))


@dataclass(frozen=True)
class UniformSampler(ClientSampler):
    """`clients_per_round` clients, drawn uniformly without replacement (McMahan et al. 2017, arXiv 1602.05629)."""

    clients_per_round: int
    name = "sample"

    def round_size(self, clients: int) -> int:
        return self.clients_per_round

    def sample(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        if not 0 < self.clients_per_round <= clients:
            raise ValueError(
                f"client_sampling.clients_per_round={self.clients_per_round} cannot be drawn from {clients} clients.\n"
                f"  valid: 1 to {clients}"
            )
        chosen = numpy_generator(seed, "cohort", index).choice(clients, self.clients_per_round, replace=False)
        return tuple(sorted(chosen.tolist()))


@dataclass(frozen=True)
class Event:
    """One line of a trace: from `round` on (the first is 1) the client is available, or is not."""

    line: int
    round: int
    client: int
    joins: bool


@dataclass(frozen=True)
class AvailabilityTrace(ClientSampler):
    """Clients that join and leave according to a file; `clients_per_round` of the available ones are drawn.

    The file is CSV with the columns round (from 1), client (from 0) and event (join or leave), which takes effect from
    that round on. Before its first event a client is available if that event is `leave`. A client without events is
    always available.

    Attributes:
        file: path of the trace.
        clients_per_round: how many are drawn if more are available; None for all.

    Raises:
        ValueError: `sample` cannot read the file, or a line is invalid.
    """

    file: Path
    clients_per_round: int | None = None
    name = "trace"

    def round_size(self, clients: int) -> int:
        return clients if self.clients_per_round is None else min(self.clients_per_round, clients)

    def fingerprint(self) -> str:
        return str(self.events)

    def sample(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        if self.clients_per_round is not None and self.clients_per_round < 1:
            raise ValueError(
                f"client_sampling.clients_per_round={self.clients_per_round}\n  valid: a whole number from 1, or null"
            )
        available = self._available(clients, index)
        if self.clients_per_round is None or self.clients_per_round >= len(available):
            return available
        chosen = numpy_generator(seed, "cohort", index).choice(available, self.clients_per_round, replace=False)
        return tuple(sorted(chosen.tolist()))

    @cached_property
    def events(self) -> list[Event]:
        """The events of the file, sorted by round."""
        return sorted(_read_events(Path(self.file).expanduser()), key=lambda event: event.round)

    def _available(self, clients: int, index: int) -> tuple[int, ...]:
        available: set[int] = set(range(clients))
        seen: set[int] = set()
        for event in self.events:
            if event.client >= clients:
                raise ValueError(
                    f"client_sampling.file={self.file}, line {event.line}: client {event.client}\n"
                    f"  valid: 0 to {clients - 1}"
                )
            if event.joins and event.client not in seen:
                available.discard(event.client)
            seen.add(event.client)
        for event in self.events:
            if event.round <= index + 1:
                (available.add if event.joins else available.discard)(event.client)
        return tuple(sorted(available))


def _read_events(path: Path) -> list[Event]:
    """Read the lines of a trace; raise ValueError naming the first invalid one."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if not set(TRACE_COLUMNS) <= set(reader.fieldnames or ()):
                missing = f"line 1 lacks the columns {', '.join(TRACE_COLUMNS)}"
                raise ValueError(f"client_sampling.file={path}, {missing}{VALID_TRACE}")
            return [_parse_event(path, reader.line_num, line) for line in reader]
    except OSError as error:
        raise ValueError(f"client_sampling.file={path}: {error.strerror}{VALID_TRACE}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"client_sampling.file={path} is not text in UTF-8{VALID_TRACE}") from error


def _parse_event(path: Path, number: int, line: dict[str, str]) -> Event:
    try:
        round, client, event = (str(line[column]).strip() for column in TRACE_COLUMNS)
        parsed = Event(number, int(round), int(client), event == "join")
        if parsed.round >= 1 and parsed.client >= 0 and event in ("join", "leave"):
            return parsed
    except ValueError:
        pass
    given = ", ".join(f"{column}={line[column]}" for column in TRACE_COLUMNS)
    raise ValueError(f"client_sampling.file={path}, line {number}: {given}{VALID_TRACE}")
