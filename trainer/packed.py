"""The wire that packs: silos send few bytes, and what is lost of a vector is sent with the next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer import comm
from trainer.codecs import Codec
from trainer.cohort import Round
from trainer.comm import Pending
from trainer.residuals import Kind, Residuals
from trainer.topology import Topology
from trainer.wires import Arrivals, Plain, Rule, parts_of

T = TypeVar("T")

FEW = 3  # silos, each of which may well add up what all send


class Packed:
    """Sums over the silos of what a codec makes of their vectors, with error feedback; equal bits on all ranks.

    p = vector + residual is packed, and p - unpack(pack(p)) is the next residual: Seide et al. 2014 (Interspeech),
    Stich et al. 2018 (arXiv 1809.07599). Up to 3 silos send all they have to each other, and each adds it up, in the
    order of silos and the dtype of the vector. From 4 on each silo adds up one share of the numbers and sends all the
    sum, packed, with a residual of its own (Tang et al. 2019, arXiv 1905.05957): what a silo sends is twice the vector,
    however many there are. A single silo has nobody to send to, and loses nothing.
    """

    stateful = True

    def __init__(self, topology: Topology, codec: Codec):
        self.topology, self.codec = topology, codec
        self.plain = Plain(topology)
        self.residuals = Residuals()
        self.bytes_sent = 0

    def begin_round(self, round: Round) -> None:
        self.round = round

    def parts(self, length: int) -> list[slice]:
        return self.plain.parts(length)

    def start(self, vector: Tensor, name: str) -> Arrivals:
        parts = [part for part in self.parts(len(vector)) if part.stop > part.start]
        if self.topology.num_silos == 1:
            return ((part, self._with_residual(vector[part], name, part.start)) for part in parts)
        self.bytes_sent += self._bytes(len(vector))
        return self._start_sharing(vector, parts, name) if self._shares_sums else self._start_all(vector, parts, name)

    def join(self, vector: Tensor) -> Tensor:
        return self.plain.join(vector)

    def add_up(self, value: float) -> float:
        return self.plain.add_up(value)

    def by_columns(self, rows: Tensor, rule: Rule) -> Tensor:
        raise AssertionError("a Run packs nothing that is not summed")

    def state_dict(self) -> dict[str, Any]:
        return self.residuals.state_dict()

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], length: int, same_world: bool) -> None:
        spans = [span for part in self.parts(length) for span in self._spans(part)]
        sums = [self._own(part) for part in self.parts(length)] if same_world and self._shares_sums else []
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

    def _bytes(self, length: int) -> int:
        """What all silos send of a vector."""
        silos = self.topology.num_silos
        firsts = [self._spans(part)[0] for part in parts_of(slice(0, length // self.topology.num_slices))]
        rows = sum(self.codec.size(first.stop - first.start) for first in firsts)
        return silos * (silos - 1) * self.topology.num_slices * rows * (2 if self._shares_sums else 1)

    def _with_residual(self, values: Tensor, name: str, place: int) -> Tensor:
        """A silo that was not always alone may have something left to bring."""
        residual = self.residuals.piece(name, "payload", place, values)
        values.add_(residual)
        residual.zero_()
        return values

    def _start_all(self, vector: Tensor, parts: Sequence[slice], name: str) -> Arrivals:
        """Each part goes to all silos, the first while the next is packed."""
        rows = (self._packed(vector, [part], name, "payload") for part in parts)
        gathers = [comm.start_gather_of_slices(row.view(-1), self.topology) for row in rows]
        return ((part, self._sum(gather.wait(), vector[part])) for part, gather in zip(parts, gathers, strict=True))

    def _start_sharing(self, vector: Tensor, parts: Sequence[slice], name: str) -> Arrivals:
        """Of each part every silo gets a share from all, the first while the next is packed."""
        rows = (self._packed(vector, self._spans(part), name, "payload") for part in parts)
        exchanges = [comm.start_exchange_of_slices(row, self.topology) for row in rows]
        sums = (self._share_sum(vector, part, name, exchange) for part, exchange in zip(parts, exchanges, strict=True))
        return (self._joined(vector, part, gather) for part, gather in _one_behind(sums))

    def _share_sum(self, vector: Tensor, part: slice, name: str, exchange: Pending) -> tuple[slice, Pending]:
        """Begins to send this silo's share of the sum to all."""
        own = self._own(part)
        self._sum(exchange.wait(), vector[own])
        row = self._packed(vector, [own], name, "total", exchange.rows.shape[1])
        return part, comm.start_gather_of_slices(row.view(-1), self.topology)

    def _joined(self, vector: Tensor, part: slice, gather: Pending) -> tuple[slice, Tensor]:
        """A part of the vector, of the shares that all silos have summed."""
        for row, span in zip(gather.wait(), self._spans(part), strict=True):
            self._unpack(row, vector[span])
        return part, vector[part]

    def _packed(self, vector: Tensor, spans: Sequence[slice], name: str, kind: Kind, size: int = 0) -> Tensor:
        """Rows [spans, size] of the vector + residual. The vector becomes what is sent, the residual what is not.

        The size is that of the first span, which is the longest, or what is given.
        """
        size = max(size, self.codec.size(spans[0].stop - spans[0].start))
        rows = torch.zeros(len(spans), size, dtype=torch.uint8, device=vector.device)
        for row, span in zip(rows, spans, strict=True):
            values = vector[span]
            residual = self.residuals.piece(name, kind, span.start, values).add_(values)
            seed = self.round.seed_for("uplink", name, kind, self.topology.silo, span.start)
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


def _one_behind(items: Iterator[T]) -> Iterator[T]:
    """The items, each when the next has been made."""
    last: list[T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last
