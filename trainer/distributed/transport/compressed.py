"""Sums over the silos of vectors that a codec encodes, with error feedback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.compression import Codec
from trainer.distributed.topology import Topology
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
        self.codec: Codec = codec  # pyright: ignore[reportIncompatibleVariableOverride] (nobody changes it)
        self.collectives_per_chunk = 2 if self._is_two_stage else 1

    def chunk_bytes(self, spans: Sequence[slice], element_size: int) -> int:
        silos, firsts = self.topology.num_silos, [self._encoded_spans(span)[0] for span in spans]
        rows = sum(self.codec.encoded_size(first.stop - first.start) for first in firsts)
        return silos * (silos - 1) * rows * (2 if self._is_two_stage else 1)

    def sum_chunk(self, name: str, span: slice, values: Tensor) -> collectives.Task:
        chunk, group = Chunk(name, span, values), self.topology.inter_silo_group
        spans = self._encoded_spans(span)
        encoded = self._encode(chunk, spans, "payload")
        if not self._is_two_stage:
            rows = yield collectives.all_gather_async(encoded.view(-1), group)
            yield span, self._decode_and_sum(rows, values)
            return
        rows = yield collectives.all_to_all_async(encoded, group)
        own = spans[self.topology.silo]
        self._decode_and_sum(rows, chunk.values_at(own))
        total = self._encode(chunk, [own], "total", rows.shape[1])
        for row, of in zip((yield collectives.all_gather_async(total.view(-1), group)), spans, strict=True):
            self._decode(row, chunk.values_at(of))
        yield span, values

    def state_dict(self) -> dict[str, Any]:
        return self.residuals.state_dict()

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        spans = [span for part in parts for span in self._encoded_spans(part)]
        sums = (
            [self._encoded_spans(part)[self.topology.silo] for part in parts]
            if same_world and self._is_two_stage
            else []
        )
        for state in states:
            self.residuals.load(state, spans, sums, self.topology.device)

    @property
    def _sender(self) -> int:
        """The index of this silo's part among all that encode: each has random numbers of its own."""
        return self.topology.silo + self.topology.num_silos * self.topology.part

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
            seed = self.seed_for("uplink", chunk.name, value_type, self._sender, span.start)
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
