"""A wire to silos that are not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.distributed.transport import Wire
from trainer.distributed.transport.base import Arrivals, Rule, SeedFor, shifted, width_of


class Silent:
    """What comes in is what went out, and what the wire in its place would move is noted.

    rows          of a round, that all silos would bring to be combined by columns
    vectors       that were to be summed, without their numbers, and where in a whole vector each begins
    bytes_sent    by all silos, between them
    bytes_joined  of the vectors that were made whole inside the silo
    bytes_held    of the rows, where they are combined
    """

    stateful = False
    seconds_waited = 0.0

    def __init__(self, wire: Wire, num_silos: int, rows: int):
        self.wire, self.unit, self.num_silos, self.rows = wire, wire.unit, num_silos, rows
        self.bytes_held = 0
        self.forget()

    def forget(self) -> None:
        """Notes anew."""
        self.vectors: list[tuple[Tensor, int]] = []
        self.bytes_sent = self.bytes_joined = 0

    def begin_round(self, seed_for: SeedFor) -> None:
        pass

    def parts(self, length: int) -> list[slice]:
        return self.wire.parts(length)

    def bytes_of(self, vector: Tensor, offset: int = 0) -> int:
        return self.wire.bytes_of(vector, offset)

    def start(self, vector: Tensor, name: str, offset: int = 0) -> Arrivals:
        self.vectors.append((torch.empty_like(vector, device="meta"), offset))
        self.bytes_sent += self.bytes_of(vector, offset)
        parts = [part for part in self.parts(len(vector)) if part.stop > part.start]
        return ((shifted(part, offset), vector[part]) for part in parts)

    def ahead(self, vector: Tensor, name: str) -> Tensor:
        return self.join(vector.clone()) if self.wire.stateful and self.num_silos > 1 else vector

    def join(self, vector: Tensor) -> Tensor:
        self.bytes_joined += vector.nbytes
        return vector

    def add_up(self, value: float) -> float:
        return value

    def bytes_of_rows(self, rows: Tensor, count: int) -> int:
        return self.wire.bytes_of_rows(rows, count)

    def by_columns(self, rows: Tensor, rule: Rule) -> Tensor:
        """Of this silo's rows over and over, in the place of those of all silos."""
        self.bytes_sent += self.bytes_of_rows(rows, self.rows)
        received = rows[torch.arange(self.rows) % len(rows), : width_of(rows.shape[1], self.num_silos)]
        self.bytes_held = received.nbytes
        return rule(received, lambda tensor: tensor).repeat(self.num_silos)[: rows.shape[1]]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        pass
