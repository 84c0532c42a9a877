"""Sums over the silos of vectors that a codec encodes, with error feedback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.collectives import PendingCollective
from trainer.distributed.compression import Codec
from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import ReducedChunks, chunks_of, pipelined, shift_slice
from trainer.distributed.transport.error_feedback import ErrorFeedbackTransport, ResidualKind

MAX_DIRECT_SILOS = 3  # up to which each silo sums what all others send


@dataclass(frozen=True)
class Chunk:
    """A span of a vector that one collective sends.

    name    of the vector
    span    in the whole vector
    values  the vector's memory at the span
    """

    name: str
    span: slice
    values: Tensor

    def values_at(self, span: slice) -> Tensor:
        """Return the values at a span of the whole vector."""
        return self.values[span.start - self.span.start : span.stop - self.span.start]


class CompressedAllReduce(ErrorFeedbackTransport):
    """Sums over the silos of vectors that a codec encodes, with error feedback; the same bits on all ranks.

    p = vector + residual is encoded, and p - decode(encode(p)) is the next residual: Seide et al. 2014 (Interspeech),
    Stich et al. 2018 (arXiv 1809.07599). Up to 3 silos send their vectors to each other, and each sums them, in the
    order of silos and the dtype of the vector. From 4 silos on each sums one share of the values, and sends the encoded
    sum to all, with a residual of its own (Tang et al. 2019, arXiv 1905.05957). A silo then sends twice the vector,
    whatever their number. A single silo sends and loses nothing.

    Args:
        topology: of this rank
        codec: encodes vectors and sums
    """

    def __init__(self, topology: Topology, codec: Codec):
        super().__init__(topology)
        self.codec = codec

    def all_reduce_bytes(self, vector: Tensor, offset: int = 0) -> int:
        silos, shards = self.topology.num_silos, self.topology.num_shards
        firsts = [self._encoded_spans(part)[0] for part in chunks_of(slice(0, len(vector) // shards))]
        rows = sum(self.codec.encoded_size(first.stop - first.start) for first in firsts)
        return silos * (silos - 1) * shards * rows * (2 if self._is_two_stage else 1)

    def all_reduce_async(self, vector: Tensor, name: str, offset: int = 0) -> ReducedChunks:
        chunks = [Chunk(name, shift_slice(part, offset), vector[part]) for part in self.chunks(len(vector))]
        chunks = [chunk for chunk in chunks if len(chunk.values)]
        if self.topology.num_silos == 1:
            return ((chunk.span, self.residuals.flush(name, chunk.span.start, chunk.values)) for chunk in chunks)
        self.bytes_sent += self.all_reduce_bytes(vector)
        return self._reduce_scatter_chunks(chunks) if self._is_two_stage else self._all_gather_chunks(chunks)

    def state_dict(self) -> dict[str, Any]:
        return self.residuals.state_dict()

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        spans = [span for part in parts for span in self._encoded_spans(part)]
        sums = [self._own_span(part) for part in parts] if same_world and self._is_two_stage else []
        for state in states:
            self.residuals.load(state, spans, sums, self.topology.device)

    @property
    def _is_two_stage(self) -> bool:
        return self.topology.num_silos > MAX_DIRECT_SILOS

    def _encoded_spans(self, part: slice) -> list[slice]:
        """Return the spans of a chunk that are encoded separately: one for each silo that sums it, or the whole chunk.

        The first span is the longest, and the last ones may be empty.
        """
        if not self._is_two_stage:
            return [part]
        width = -(-(part.stop - part.start) // self.topology.num_silos)
        starts = (part.start + width * silo for silo in range(self.topology.num_silos))
        return [slice(min(start, part.stop), min(start + width, part.stop)) for start in starts]

    def _own_span(self, part: slice) -> slice:
        """Return the span of a chunk that this silo sums."""
        return self._encoded_spans(part)[self.topology.silo]

    def _all_gather_chunks(self, chunks: Sequence[Chunk]) -> ReducedChunks:
        """Send each chunk to all silos, and sum them; a chunk travels while the next is encoded."""
        rows = (self._encode(chunk, [chunk.span], "payload") for chunk in chunks)
        gathers = [collectives.all_gather_between_silos_async(row.view(-1), self.topology) for row in rows]
        pairs = zip(chunks, gathers, strict=True)
        return (
            (chunk.span, self._decode_and_sum(self.all_reduce.wait(gather), chunk.values)) for chunk, gather in pairs
        )

    def _reduce_scatter_chunks(self, chunks: Sequence[Chunk]) -> ReducedChunks:
        """Send a share of each chunk to the silo that sums it; a chunk travels while the next is encoded."""
        rows = (self._encode(chunk, self._encoded_spans(chunk.span), "payload") for chunk in chunks)
        exchanges = [collectives.all_to_all_between_silos_async(row, self.topology) for row in rows]
        pairs = zip(chunks, exchanges, strict=True)
        sums = ((chunk, self._all_gather_sum(chunk, exchange)) for chunk, exchange in pairs)
        return (self._decode_sum(chunk, gather) for chunk, gather in pipelined(sums))

    def _all_gather_sum(self, chunk: Chunk, exchange: PendingCollective) -> PendingCollective:
        """Sum this silo's share of a chunk, and start to send it to all silos."""
        span = self._own_span(chunk.span)
        self._decode_and_sum(self.all_reduce.wait(exchange), chunk.values_at(span))
        row = self._encode(chunk, [span], "total", exchange.output.shape[1])
        return collectives.all_gather_between_silos_async(row.view(-1), self.topology)

    def _decode_sum(self, chunk: Chunk, gather: PendingCollective) -> tuple[slice, Tensor]:
        """Decode the shares of a chunk that all silos have summed."""
        for row, span in zip(self.all_reduce.wait(gather), self._encoded_spans(chunk.span), strict=True):
            self._decode(row, chunk.values_at(span))
        return chunk.span, chunk.values

    def _encode(self, chunk: Chunk, spans: Sequence[slice], value_type: ResidualKind, size: int = 0) -> Tensor:
        """Encode values + residual. The values become those that are sent, and the residual the rest.

        Args:
            chunk: the values
            spans: those that are encoded separately, the longest first
            value_type: of the residuals
            size: the least number of bytes of a row

        Returns:
            rows [spans, bytes], each padded to the longest
        """
        size = max(size, self.codec.encoded_size(spans[0].stop - spans[0].start))
        rows = torch.zeros(len(spans), size, dtype=torch.uint8, device=chunk.values.device)
        for row, span in zip(rows, spans, strict=True):
            values = chunk.values_at(span)
            residual = self.residuals.residual(chunk.name, value_type, span.start, values).add_(values)
            seed = self.seed_for("uplink", chunk.name, value_type, self.topology.silo, span.start)
            self.codec.encode(residual, row[: self.codec.encoded_size(len(values))], seed)
            self._decode(row, values)
            residual.sub_(values)
        return rows

    def _decode(self, row: Tensor, values: Tensor) -> None:
        self.codec.decode(row[: self.codec.encoded_size(len(values))], values)

    def _decode_and_sum(self, rows: Tensor, values: Tensor) -> Tensor:
        """Add the rows of the other silos to the values, which are this silo's decoded row.

        The sum is that in the order of silos, so that all silos get the same bits.
        """
        silo, decoded = self.topology.silo, torch.empty_like(values)
        if silo:
            earlier = torch.empty_like(values)
            self._decode(rows[0], earlier)
            for row in rows[1:silo]:
                self._decode(row, decoded)
                earlier.add_(decoded)
            values.add_(earlier)
        for row in rows[silo + 1 :]:
            self._decode(row, decoded)
            values.add_(decoded)
        return values
