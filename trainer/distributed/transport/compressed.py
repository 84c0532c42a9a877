"""The wire that packs: silos send few bytes, and what is lost of a vector is sent with the next one."""

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
from trainer.distributed.transport.error_feedback import ResidualKind
from trainer.distributed.transport.lossy import ErrorFeedbackTransport

MAX_DIRECT_SILOS = 3  # silos, each of which may well add up what all send


@dataclass(frozen=True)
class Chunk:
    """What is packed together: a part of the vector of this name, from its place on."""

    name: str
    span: slice
    values: Tensor

    def values_at(self, span: slice) -> Tensor:
        """The values of a span of the whole vector."""
        return self.values[span.start - self.span.start : span.stop - self.span.start]


class CompressedAllReduce(ErrorFeedbackTransport):
    """Sums over the silos of what a codec makes of their vectors, with error feedback; equal bits on all ranks.

    p = vector + residual is packed, and p - unpack(pack(p)) is the next residual: Seide et al. 2014 (Interspeech),
    Stich et al. 2018 (arXiv 1809.07599). Up to 3 silos send all they have to each other, and each adds it up, in the
    order of silos and the dtype of the vector. From 4 on each silo adds up one share of the numbers and sends all the
    sum, packed, with a residual of its own (Tang et al. 2019, arXiv 1905.05957): what a silo sends is twice the vector,
    however many there are. A single silo has nobody to send to, and loses nothing.
    """

    def __init__(self, topology: Topology, codec: Codec):
        super().__init__(topology)
        self.codec = codec

    def all_reduce_bytes(self, vector: Tensor, offset: int = 0) -> int:
        silos, slices = self.topology.num_silos, self.topology.num_shards
        firsts = [self._encoded_spans(part)[0] for part in chunks_of(slice(0, len(vector) // slices))]
        rows = sum(self.codec.encoded_size(first.stop - first.start) for first in firsts)
        return silos * (silos - 1) * slices * rows * (2 if self._is_two_stage else 1)

    def all_reduce_async(self, vector: Tensor, name: str, offset: int = 0) -> ReducedChunks:
        pieces = [Chunk(name, shift_slice(part, offset), vector[part]) for part in self.chunks(len(vector))]
        pieces = [piece for piece in pieces if len(piece.values)]
        if self.topology.num_silos == 1:
            return ((piece.span, self.residuals.flush(name, piece.span.start, piece.values)) for piece in pieces)
        self.bytes_sent += self.all_reduce_bytes(vector)
        return self._reduce_scatter_chunks(pieces) if self._is_two_stage else self._all_gather_chunks(pieces)

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
        """What is packed by itself of a part: the shares that silos sum, of which the last may be empty, or all."""
        if not self._is_two_stage:
            return [part]
        width = -(-(part.stop - part.start) // self.topology.num_silos)
        starts = (part.start + width * silo for silo in range(self.topology.num_silos))
        return [slice(min(start, part.stop), min(start + width, part.stop)) for start in starts]

    def _own_span(self, part: slice) -> slice:
        """The share of a part that this silo sums."""
        return self._encoded_spans(part)[self.topology.silo]

    def _all_gather_chunks(self, chunks: Sequence[Chunk]) -> ReducedChunks:
        """Each piece goes to all silos, the first while the next is packed."""
        rows = (self._encode(piece, [piece.span], "payload") for piece in chunks)
        gathers = [collectives.all_gather_between_silos_async(row.view(-1), self.topology) for row in rows]
        both = zip(chunks, gathers, strict=True)
        return (
            (piece.span, self._decode_and_sum(self.all_reduce.wait(gather), piece.values)) for piece, gather in both
        )

    def _reduce_scatter_chunks(self, chunks: Sequence[Chunk]) -> ReducedChunks:
        """Of each piece every silo gets a share from all, the first while the next is packed."""
        rows = (self._encode(piece, self._encoded_spans(piece.span), "payload") for piece in chunks)
        exchanges = [collectives.all_to_all_between_silos_async(row, self.topology) for row in rows]
        both = zip(chunks, exchanges, strict=True)
        sums = ((piece, self._all_gather_sum(piece, exchange)) for piece, exchange in both)
        return (self._decode_sum(piece, gather) for piece, gather in pipelined(sums))

    def _all_gather_sum(self, chunk: Chunk, exchange: PendingCollective) -> PendingCollective:
        """Begins to send this silo's share of the sum to all."""
        own = self._own_span(chunk.span)
        self._decode_and_sum(self.all_reduce.wait(exchange), chunk.values_at(own))
        row = self._encode(chunk, [own], "total", exchange.output.shape[1])
        return collectives.all_gather_between_silos_async(row.view(-1), self.topology)

    def _decode_sum(self, chunk: Chunk, gather: PendingCollective) -> tuple[slice, Tensor]:
        """A piece made of the shares that all silos have summed."""
        for row, span in zip(self.all_reduce.wait(gather), self._encoded_spans(chunk.span), strict=True):
            self._decode(row, chunk.values_at(span))
        return chunk.span, chunk.values

    def _encode(self, chunk: Chunk, spans: Sequence[slice], value_type: ResidualKind, size: int = 0) -> Tensor:
        """Rows [spans, size] of values + residual. The values become what is sent, the residual what is not.

        The size is that of the first span, which is the longest, or what is given.
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
        """The sum of what is packed in the rows, in their order. The values are what is packed in this silo's."""
        own, one = self.topology.silo, torch.empty_like(values)
        if own:
            before = torch.empty_like(values)
            self._decode(rows[0], before)
            for row in rows[1:own]:
                self._decode(row, one)
                before.add_(one)
            values.add_(before)
        for row in rows[own + 1 :]:
            self._decode(row, one)
            values.add_(one)
        return values
