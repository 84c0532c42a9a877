"""The wire that packs: silos send few bytes, and what is lost of a vector is sent with the next one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.collectives import Pending
from trainer.distributed.compression import Codec
from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import Arrivals, one_behind, parts_of, shifted
from trainer.distributed.transport.error_feedback import Kind
from trainer.distributed.transport.lossy import Lossy

FEW = 3  # silos, each of which may well add up what all send


@dataclass(frozen=True)
class Piece:
    """What is packed together: a part of the vector of this name, from its place on."""

    name: str
    place: slice
    values: Tensor

    def at(self, span: slice) -> Tensor:
        """The values of a span of the whole vector."""
        return self.values[span.start - self.place.start : span.stop - self.place.start]


class Packed(Lossy):
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

    def bytes_of(self, vector: Tensor, offset: int = 0) -> int:
        silos, slices = self.topology.num_silos, self.topology.num_slices
        firsts = [self._spans(part)[0] for part in parts_of(slice(0, len(vector) // slices))]
        rows = sum(self.codec.size(first.stop - first.start) for first in firsts)
        return silos * (silos - 1) * slices * rows * (2 if self._shares_sums else 1)

    def start(self, vector: Tensor, name: str, offset: int = 0) -> Arrivals:
        pieces = [Piece(name, shifted(part, offset), vector[part]) for part in self.parts(len(vector))]
        pieces = [piece for piece in pieces if len(piece.values)]
        if self.topology.num_silos == 1:
            return ((piece.place, self.residuals.flush(name, piece.place.start, piece.values)) for piece in pieces)
        self.bytes_sent += self.bytes_of(vector)
        return self._start_sharing(pieces) if self._shares_sums else self._start_all(pieces)

    def state_dict(self) -> dict[str, Any]:
        return self.residuals.state_dict()

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        spans = [span for part in parts for span in self._spans(part)]
        sums = [self._own(part) for part in parts] if same_world and self._shares_sums else []
        for state in states:
            self.residuals.load(state, spans, sums, self.topology.device)

    @property
    def _shares_sums(self) -> bool:
        return self.topology.num_silos > FEW

    def _spans(self, part: slice) -> list[slice]:
        """What is packed by itself of a part: the shares that silos sum, of which the last may be empty, or all."""
        if not self._shares_sums:
            return [part]
        width = -(-(part.stop - part.start) // self.topology.num_silos)
        starts = (part.start + width * silo for silo in range(self.topology.num_silos))
        return [slice(min(start, part.stop), min(start + width, part.stop)) for start in starts]

    def _own(self, part: slice) -> slice:
        """The share of a part that this silo sums."""
        return self._spans(part)[self.topology.silo]

    def _start_all(self, pieces: Sequence[Piece]) -> Arrivals:
        """Each piece goes to all silos, the first while the next is packed."""
        rows = (self._packed(piece, [piece.place], "payload") for piece in pieces)
        gathers = [collectives.start_gather_of_slices(row.view(-1), self.topology) for row in rows]
        both = zip(pieces, gathers, strict=True)
        return ((piece.place, self._sum(self.plain.wait(gather), piece.values)) for piece, gather in both)

    def _start_sharing(self, pieces: Sequence[Piece]) -> Arrivals:
        """Of each piece every silo gets a share from all, the first while the next is packed."""
        rows = (self._packed(piece, self._spans(piece.place), "payload") for piece in pieces)
        exchanges = [collectives.start_exchange_of_slices(row, self.topology) for row in rows]
        both = zip(pieces, exchanges, strict=True)
        sums = ((piece, self._share_sum(piece, exchange)) for piece, exchange in both)
        return (self._joined(piece, gather) for piece, gather in one_behind(sums))

    def _share_sum(self, piece: Piece, exchange: Pending) -> Pending:
        """Begins to send this silo's share of the sum to all."""
        own = self._own(piece.place)
        self._sum(self.plain.wait(exchange), piece.at(own))
        row = self._packed(piece, [own], "total", exchange.arriving.shape[1])
        return collectives.start_gather_of_slices(row.view(-1), self.topology)

    def _joined(self, piece: Piece, gather: Pending) -> tuple[slice, Tensor]:
        """A piece made of the shares that all silos have summed."""
        for row, span in zip(self.plain.wait(gather), self._spans(piece.place), strict=True):
            self._unpack(row, piece.at(span))
        return piece.place, piece.values

    def _packed(self, piece: Piece, spans: Sequence[slice], kind: Kind, size: int = 0) -> Tensor:
        """Rows [spans, size] of values + residual. The values become what is sent, the residual what is not.

        The size is that of the first span, which is the longest, or what is given.
        """
        size = max(size, self.codec.size(spans[0].stop - spans[0].start))
        rows = torch.zeros(len(spans), size, dtype=torch.uint8, device=piece.values.device)
        for row, span in zip(rows, spans, strict=True):
            values = piece.at(span)
            residual = self.residuals.piece(piece.name, kind, span.start, values).add_(values)
            seed = self.seed_for("uplink", piece.name, kind, self.topology.silo, span.start)
            self.codec.pack(residual, row[: self.codec.size(len(values))], seed)
            self._unpack(row, values)
            residual.sub_(values)
        return rows

    def _unpack(self, row: Tensor, values: Tensor) -> None:
        self.codec.unpack(row[: self.codec.size(len(values))], values)

    def _sum(self, rows: Tensor, values: Tensor) -> Tensor:
        """The sum of what is packed in the rows, in their order. The values are what is packed in this silo's."""
        own, one = self.topology.silo, torch.empty_like(values)
        if own:
            before = torch.empty_like(values)
            self._unpack(rows[0], before)
            for row in rows[1:own]:
                self._unpack(row, one)
                before.add_(one)
            values.add_(before)
        for row in rows[own + 1 :]:
            self._unpack(row, one)
            values.add_(one)
        return values
