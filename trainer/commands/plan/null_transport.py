"""Transport without peers."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed.transport import Transport
from trainer.distributed.transport.base import ColumnReduction, ReducedChunks, columns_per_silo, shift_slice
from trainer.distributed.transport.compressed import MAX_DIRECT_SILOS


class NullTransport(Transport):
    """Transport that returns its input, and counts the bytes that another would send.

    Attributes:
        rows: rows of a round, of all silos, that are reduced by columns.
        bytes_sent: sent between the silos, by all of them.
        bytes_all_gathered: size of the vectors that were gathered inside the silo.
        bytes_held: size of the rows where they are reduced.
    """

    wait_seconds = 0.0

    def __init__(self, transport: Transport, num_silos: int, rows: int):
        self.transport, self.alignment, self.codec = transport, transport.alignment, transport.codec
        self.num_silos, self.rows = num_silos, rows
        self.bytes_held = 0
        self.reset()

    def reset(self) -> None:
        """Reset the counters."""
        self.bytes_sent = self.bytes_all_gathered = 0

    def chunks(self, length: int, offset: int = 0) -> list[slice]:
        return self.transport.chunks(length, offset)

    def all_reduce_bytes(self, vector: Tensor, offset: int = 0) -> int:
        return self.transport.all_reduce_bytes(vector, offset)

    def all_reduce_async(self, vector: Tensor, name: str, offset: int = 0) -> ReducedChunks:
        self.bytes_sent += self.all_reduce_bytes(vector, offset)
        return ((shift_slice(part, offset), self._compress(vector[part])) for part in self.chunks(len(vector)))

    def _compress(self, values: Tensor) -> Tensor:
        """Return the values, after the work of their codec for all silos."""
        if self.codec and self.num_silos > 1:
            decoded = torch.empty_like(values)
            encoded = torch.zeros(self.codec.encoded_size(len(values)), dtype=torch.uint8, device=values.device)
            self.codec.encode(values, encoded, 0)
            for _ in range(min(self.num_silos, MAX_DIRECT_SILOS)):
                self.codec.decode(encoded, decoded)
        return values

    def lookahead(self, vector: Tensor, name: str) -> Tensor:
        return self.all_gather(vector.clone()) if self.transport.stateful and self.num_silos > 1 else vector

    def all_gather(self, vector: Tensor, offset: int = 0) -> Tensor:
        self.bytes_all_gathered += vector.nbytes
        return vector

    def all_reduce_in_silo(self, value: float) -> float:
        return value

    def norm_over_parts(self, norm: float) -> float:
        return norm

    def counted(self, length: int, offset: int = 0) -> int:
        return self.transport.counted(length, offset)

    def all_reduce_columns_bytes(self, rows: Tensor, count: int) -> int:
        return self.transport.all_reduce_columns_bytes(rows, count)

    def all_reduce_columns(self, rows: Tensor, rule: ColumnReduction) -> Tensor:
        """Reduce this silo's rows, repeated to stand for those of all silos."""
        self.bytes_sent += self.all_reduce_columns_bytes(rows, self.rows)
        received = rows[torch.arange(self.rows) % len(rows), : columns_per_silo(rows.shape[1], self.num_silos)]
        self.bytes_held = received.nbytes
        return rule(received, lambda tensor: tensor).repeat(self.num_silos)[: rows.shape[1]]
