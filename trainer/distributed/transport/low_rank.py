"""The wire that sends matrices as products of thin ones, and what these could not say with the next ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.collectives import PendingCollective
from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import ReducedChunks, chunks_of, pipelined, shift_slice
from trainer.distributed.transport.lossy import ErrorFeedbackTransport
from trainer.utils.seeding import generator

CACHE_SIZE = 1 << 16  # numbers of a product that several operations go over while they lie in the cache


@dataclass(frozen=True)
class MatrixRows:
    """Whole rows of a matrix that lie in a vector, from the place `start` on."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    def of(self, vector: Tensor) -> Tensor:
        """What a vector holds there [rows, columns]."""
        return vector[self.start : self.stop].view(self.rows, self.columns)


def matrices_in_chunk(part: slice, matrices: Iterable[MatrixRows], rank: int) -> list[MatrixRows]:
    """The rows of matrices that lie whole in this part, by their places in it, where rank (n + m) numbers are fewer."""
    found = []
    for matrix in matrices:
        first = max(0, -(-(part.start - matrix.start) // matrix.columns))
        last = min(matrix.rows, (part.stop - matrix.start) // matrix.columns)
        block = MatrixRows(matrix.start + first * matrix.columns - part.start, last - first, matrix.columns)
        if block.rows > 0 and rank * (block.rows + block.columns) < block.rows * block.columns:
            found.append(block)
    return found


@dataclass
class InFlightChunk:
    """A part of a vector on its way.

    span    that of its numbers in the whole vector
    values   the vector's memory there
    compensated    vector + residual in the blocks' places, and at last the residual
    blocks   what of the part goes as P Q^T
    uncompressed     what goes as it is
    pending  the numbers that are travelling
    p_factors  P of each block
    """

    span: slice
    values: Tensor
    compensated: Tensor
    blocks: list[MatrixRows]
    uncompressed: list[slice]
    pending: PendingCollective
    p_factors: list[Tensor]


class PowerSGDAllReduce(ErrorFeedbackTransport):
    """Sums over the silos of which each matrix is P Q^T, of a small rank, with error feedback; equal bits on all ranks.

    PowerSGDReducer, Vogels et al. 2019 (arXiv 1905.13727), algorithm 1: M is a silo's matrix + residual. P = sum of M Q, with
    the Q of the round before, or a random one; P is made orthonormal; Q = sum of M^T P; the total is P Q^T, and a
    silo's residual its own M - P (M^T P)^T. A parameter of several dimensions is a matrix with a row for each entry of
    the first; of a matrix in several parts of the vector each part's rows are one by themselves. What is no matrix, or
    too small to be worth it, goes as it is. The first silo makes P orthonormal for all, and products are summed by
    elementwise operations, because matrix libraries differ by bits from machine to machine.
    """

    def __init__(self, topology: Topology, rank: int, layout: Sequence[tuple[int, torch.Size]]):
        """`layout` are those of the parameters in a vector: where each starts, and its shape."""
        super().__init__(topology)
        self.rank = rank
        self.matrices = [MatrixRows(start, shape[0], shape[1:].numel()) for start, shape in layout if len(shape) > 1]
        self.q_factors: dict[tuple[str, int], Tensor] = {}  # Q of the last round

    def all_reduce_bytes(self, vector: Tensor, offset: int = 0) -> int:
        # P and what is no matrix by an all-reduce, orthonormal P, and Q by an all-reduce.
        width, numbers = len(vector) // self.topology.num_shards, 0
        slices = (slice(start, start + width) for start in range(offset, offset + len(vector), max(width, 1)))
        for part in (part for own in slices for part in chunks_of(own)):
            blocks = matrices_in_chunk(part, self.matrices, self.rank)
            columns = self.rank * sum(block.rows for block in blocks)
            rows = self.rank * sum(block.columns for block in blocks)
            rest = part.stop - part.start - sum(block.stop - block.start for block in blocks)
            numbers += 2 * (columns + rest) + columns + 2 * rows
        return (self.topology.num_silos - 1) * numbers * vector.element_size()

    def all_reduce_async(self, vector: Tensor, name: str, offset: int = 0) -> ReducedChunks:
        parts = [
            (shift_slice(part, offset), vector[part]) for part in self.chunks(len(vector)) if part.stop > part.start
        ]
        if self.topology.num_silos == 1:
            return ((place, self.residuals.flush(name, place.start, values)) for place, values in parts)
        self.bytes_sent += self.all_reduce_bytes(vector, offset)
        flights = [self._start_p_all_reduce(place, values, name) for place, values in parts]
        based = pipelined(self._broadcast_p(flight) for flight in flights)
        crossed = pipelined(self._start_q_all_reduce(flight) for flight in based)
        return (self._decode_sum(flight, name) for flight in crossed)

    def state_dict(self) -> dict[str, Any]:
        rows: dict[str, dict[str, Tensor]] = {}
        for (name, start), numbers in self.q_factors.items():
            rows.setdefault(name, {})[str(start)] = numbers
        return {"residuals": self.residuals.state_dict(), "rows": rows}

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        for state in states:
            self.residuals.load(state["residuals"], parts, [], self.topology.device)
            if same_world:  # in another one blocks are others, and begin at random
                rows = [(name, int(start), q) for name, rows in state["rows"].items() for start, q in rows.items()]
                own = [row for row in rows if any(part.start <= row[1] < part.stop for part in parts)]
                self.q_factors |= {(name, start): q.to(self.topology.device) for name, start, q in own}

    def _start_p_all_reduce(self, place: slice, values: Tensor, name: str) -> InFlightChunk:
        """Begins the sum of P = M Q, and of what goes as it is."""
        given = self.residuals.residual(name, "payload", place.start, values).add_(values)
        blocks = matrices_in_chunk(place, self.matrices, self.rank)
        edges = [0, *(edge for block in blocks for edge in (block.start, block.stop)), len(given)]
        rest = [slice(first, last) for first, last in list(pairwise(edges))[::2]]
        columns = [block.of(given) @ self._previous_q(block, place, name, values) for block in blocks]
        pending = self._all_reduce_tensors_async([*columns, *(given[span] for span in rest)], values)
        for span in rest:
            given[span] = 0
        return InFlightChunk(place, values, given, blocks, rest, pending, columns)

    def _previous_q(self, block: MatrixRows, place: slice, name: str, like: Tensor) -> Tensor:
        """Q [m, r] of the round before, which has the directions in which the matrix moves; at first a random one."""
        key = (name, place.start + block.start)
        if key not in self.q_factors:
            draw = generator(self.seed_for("uplink", *key))
            random = torch.randn(block.columns, self.rank, generator=draw, dtype=torch.float64)
            self.q_factors[key] = random.to(like)
        return self.q_factors[key]

    def _broadcast_p(self, chunk: InFlightChunk) -> InFlightChunk:
        """Begins to bring the orthonormal P from the first silo to all."""
        *summed, rest = self.all_reduce.wait(chunk.pending).split(
            [*map(Tensor.numel, chunk.p_factors), _total_length(chunk.uncompressed)]
        )
        for span, values in zip(
            chunk.uncompressed, rest.split([s.stop - s.start for s in chunk.uncompressed]), strict=True
        ):
            chunk.values[span] = values
        if self.topology.silo == 0:
            chunk.p_factors = [torch.linalg.qr(total.view(-1, self.rank)).Q for total in summed]
        chunk.pending = collectives.broadcast_shard_async(_concatenate(chunk.p_factors, chunk.values), self.topology)
        return chunk

    def _start_q_all_reduce(self, chunk: InFlightChunk) -> InFlightChunk:
        """Begins the sum of Q = M^T P; what P Q^T cannot say of M is the residual."""
        bases = self.all_reduce.wait(chunk.pending).split([p.numel() for p in chunk.p_factors])
        chunk.p_factors = [base.view(-1, self.rank) for base in bases]
        matrices = [block.of(chunk.compensated) for block in chunk.blocks]
        rows = [matrix.T @ p for matrix, p in zip(matrices, chunk.p_factors, strict=True)]
        for matrix, p, q in zip(matrices, chunk.p_factors, rows, strict=True):
            matrix.addmm_(p, q.T, alpha=-1)
        chunk.pending = self._all_reduce_tensors_async(rows, chunk.values)
        return chunk

    def _decode_sum(self, chunk: InFlightChunk, name: str) -> tuple[slice, Tensor]:
        """The part with P Q^T in the blocks' places."""
        rows = self.all_reduce.wait(chunk.pending).split([self.rank * block.columns for block in chunk.blocks])
        for block, p, flat in zip(chunk.blocks, chunk.p_factors, rows, strict=True):
            q = self.q_factors[name, chunk.span.start + block.start] = flat.view(-1, self.rank)
            multiply(p, q, block.of(chunk.values))
        return chunk.span, chunk.values

    def _all_reduce_tensors_async(self, tensors: Sequence[Tensor], like: Tensor) -> PendingCollective:
        return collectives.all_reduce_shard_async(_concatenate(tensors, like), self.topology)


def multiply(p: Tensor, q: Tensor, out: Tensor) -> None:
    """P Q^T [n, m], of P [n, r] and Q [m, r], by elementwise operations: the same bits on all machines."""
    step = max(CACHE_SIZE // len(q), 1)
    scratch = out.new_empty(min(step, len(out)), len(q))
    for own, block in zip(p.split(step), out.split(step), strict=True):
        torch.mul(own[:, :1], q[:, 0], out=block)
        for index in range(1, p.shape[1]):
            block.add_(torch.mul(own[:, index : index + 1], q[:, index], out=scratch[: len(block)]))


def _total_length(spans: Sequence[slice]) -> int:
    return sum(span.stop - span.start for span in spans)


def _concatenate(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors] or [like[:0]])
