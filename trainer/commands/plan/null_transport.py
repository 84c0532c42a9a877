"""A wire to silos that are not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.distributed.transport import Transport
from trainer.distributed.transport.base import ColumnReduction, ReducedChunks, SeedFor, columns_per_silo, shift_slice


class NullTransport:
    """What comes in is what went out, and what the wire in its place would move is noted.

    rows          of a round, that all silos would bring to be combined by columns
    vectors       that were to be summed, without their numbers, and where in a whole vector each begins
    bytes_sent    by all silos, between them
    bytes_all_gathered  of the vectors that were made whole inside the silo
    bytes_held    of the rows, where they are combined
    """

    stateful = False
    wait_seconds = 0.0

    def __init__(self, transport: Transport, num_silos: int, rows: int):
        self.transport, self.alignment, self.num_silos, self.rows = transport, transport.alignment, num_silos, rows
        self.bytes_held = 0
        self.reset()

    def reset(self) -> None:
        """Notes anew."""
        self.vectors: list[tuple[Tensor, int]] = []
        self.bytes_sent = self.bytes_all_gathered = 0

    def start_round(self, seed_for: SeedFor) -> None:
        pass

    def chunks(self, length: int) -> list[slice]:
        return self.transport.chunks(length)

    def all_reduce_bytes(self, vector: Tensor, offset: int = 0) -> int:
        return self.transport.all_reduce_bytes(vector, offset)

    def all_reduce_async(self, vector: Tensor, name: str, offset: int = 0) -> ReducedChunks:
        self.vectors.append((torch.empty_like(vector, device="meta"), offset))
        self.bytes_sent += self.all_reduce_bytes(vector, offset)
        parts = [part for part in self.chunks(len(vector)) if part.stop > part.start]
        return ((shift_slice(part, offset), vector[part]) for part in parts)

    def lookahead(self, vector: Tensor, name: str) -> Tensor:
        return self.all_gather(vector.clone()) if self.transport.stateful and self.num_silos > 1 else vector

    def all_gather(self, vector: Tensor) -> Tensor:
        self.bytes_all_gathered += vector.nbytes
        return vector

    def all_reduce_in_silo(self, value: float) -> float:
        return value

    def all_reduce_columns_bytes(self, rows: Tensor, count: int) -> int:
        return self.transport.all_reduce_columns_bytes(rows, count)

    def all_reduce_columns(self, rows: Tensor, rule: ColumnReduction) -> Tensor:
        """Of this silo's rows over and over, in the place of those of all silos."""
        self.bytes_sent += self.all_reduce_columns_bytes(rows, self.rows)
        received = rows[torch.arange(self.rows) % len(rows), : columns_per_silo(rows.shape[1], self.num_silos)]
        self.bytes_held = received.nbytes
        return rule(received, lambda tensor: tensor).repeat(self.num_silos)[: rows.shape[1]]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        pass
