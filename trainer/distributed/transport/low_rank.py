"""Sums over the silos of matrices as products of thin ones, with error feedback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.distributed.transport.error_feedback import ErrorFeedbackTransport
from trainer.utils.seeding import generator
from trainer.utils.trees import flatten

CACHE_SIZE = 1 << 16  # numbers: several operations go over them while they are in the cache


@dataclass(frozen=True)
class MatrixRows:
    """Consecutive rows of a matrix, at `start` in a vector."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    def of(self, vector: Tensor) -> Tensor:
        """Return the view [rows, columns] of a vector."""
        return vector[self.start : self.stop].view(self.rows, self.columns)


def matrices_in_chunk(part: slice, matrices: Iterable[MatrixRows], rank: int) -> list[MatrixRows]:
    """Return the whole rows of matrices in a part of the vector, where rank (n + m) numbers are fewer.

    Starts are relative to the part.
    """
    blocks = []
    for matrix in matrices:
        first = max(0, -(-(part.start - matrix.start) // matrix.columns))
        last = min(matrix.rows, (part.stop - matrix.start) // matrix.columns)
        block = MatrixRows(matrix.start + first * matrix.columns - part.start, last - first, matrix.columns)
        if block.rows > 0 and rank * (block.rows + block.columns) < block.rows * block.columns:
            blocks.append(block)
    return blocks


class PowerSGDAllReduce(ErrorFeedbackTransport):
    """Sums over the silos in which each matrix is P Q^T, of a small rank, with error feedback.

    PowerSGD, Vogels et al. 2019 (arXiv 1905.13727), algorithm 1. M is a silo's matrix + residual. P = sum of M Q, with
    the Q of the last round, or a random one; P is made orthonormal; Q = sum of M^T P. The sum is P Q^T, and a silo's
    residual is its own M - P (M^T P)^T.

    A parameter of several dimensions is a matrix with a row for each entry of the first. If a matrix is cut between
    chunks, or between the parts of a model, the rows in each are a matrix of their own, of this rank. Vectors, and
    matrices that are too small to gain by it, are sent as they are.

    All ranks get the same bits. Matrix libraries differ in bits between machines, so silo 0 makes P orthonormal for
    all, and P Q^T is made by elementwise operations.

    Args:
        topology: of this rank
        rank: the columns of P and Q
        layout: the start and the shape of each parameter in a vector
    """

    collectives_per_chunk = 3

    def __init__(self, topology: Topology, rank: int, layout: Sequence[tuple[int, torch.Size]]):
        super().__init__(topology)
        self.rank = rank
        self.matrices = [MatrixRows(start, shape[0], shape[1:].numel()) for start, shape in layout if len(shape) > 1]
        self.q_factors: dict[tuple[str, int], Tensor] = {}  # of the last round

    def chunk_bytes(self, spans: Sequence[slice], element_size: int) -> int:
        # An all-reduce of P and of uncompressed values, a broadcast of P, and an all-reduce of Q.
        numbers = 0
        for part in spans:
            blocks = matrices_in_chunk(part, self.matrices, self.rank)
            columns = self.rank * sum(block.rows for block in blocks)
            rows = self.rank * sum(block.columns for block in blocks)
            rest = part.stop - part.start - sum(block.stop - block.start for block in blocks)
            numbers += 2 * (columns + rest) + columns + 2 * rows
        return (self.topology.num_silos - 1) * numbers * element_size

    def sum_chunk(self, name: str, span: slice, values: Tensor) -> collectives.Task:
        group, rank = self.topology.inter_silo_group, self.rank
        compensated = self.residuals.residual(name, "payload", span.start, values).add_(values)
        blocks = matrices_in_chunk(span, self.matrices, rank)
        edges = [0, *(edge for block in blocks for edge in (block.start, block.stop)), len(compensated)]
        uncompressed = [slice(first, last) for first, last in list(pairwise(edges))[::2]]
        matrices = [block.of(compensated) for block in blocks]
        # P = sum of M Q, beside the sums of what is sent as it is.
        p_factors = [
            matrix @ self._previous_q(name, span.start + block.start, matrix)
            for matrix, block in zip(matrices, blocks, strict=True)
        ]
        sent = _concatenate([*p_factors, *(compensated[rest] for rest in uncompressed)], values)
        for rest in uncompressed:
            compensated[rest] = 0
        flat = yield collectives.all_reduce_async(sent, group)
        *p_factors, sums = flat.split([*(rank * block.rows for block in blocks), sum(map(_length, uncompressed))])
        for rest, total in zip(uncompressed, sums.split(list(map(_length, uncompressed))), strict=True):
            values[rest] = total
        # Silo 0 makes P orthonormal for all.
        if self.topology.silo == 0:
            p_factors = [torch.linalg.qr(total.view(-1, rank)).Q for total in p_factors]
        flat = yield collectives.broadcast_async(_concatenate(p_factors, values), group)
        p_factors = [p.view(-1, rank) for p in flat.split([rank * block.rows for block in blocks])]
        # Q = sum of M^T P. The residual of this silo is M - P Q^T with its own Q.
        q_factors = [matrix.T @ p for matrix, p in zip(matrices, p_factors, strict=True)]
        for matrix, p, q in zip(matrices, p_factors, q_factors, strict=True):
            matrix.addmm_(p, q.T, alpha=-1)
        flat = yield collectives.all_reduce_async(_concatenate(q_factors, values), group)
        q_factors = [q.view(-1, rank) for q in flat.split([rank * block.columns for block in blocks])]
        for block, p, q in zip(blocks, p_factors, q_factors, strict=True):
            self.q_factors[name, span.start + block.start] = q
            multiply(p, q, block.of(values))
        yield span, values

    def state_dict(self) -> dict[str, Any]:
        rows: dict[str, dict[str, Tensor]] = {}
        for (name, start), numbers in self.q_factors.items():
            rows.setdefault(name, {})[str(start)] = numbers
        return {"residuals": self.residuals.state_dict(), "rows": rows}

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        for state in states:
            self.residuals.load(state["residuals"], parts, [], self.topology.device)
            if same_world:  # in another one the blocks differ, and Q starts at random
                for path, q in flatten(state["rows"]).items():
                    name, start = path.rsplit(".", 1)
                    if any(part.start <= int(start) < part.stop for part in parts):
                        self.q_factors[name, int(start)] = q.to(self.topology.device)

    def _previous_q(self, name: str, start: int, matrix: Tensor) -> Tensor:
        """Return Q [m, r] of the last round, which has the directions of the updates; a random one at first."""
        if (name, start) not in self.q_factors:
            draw = generator(self.seed_for("uplink", name, start))
            random = torch.randn(matrix.shape[1], self.rank, generator=draw, dtype=torch.float64)
            self.q_factors[name, start] = random.to(matrix)
        return self.q_factors[name, start]


def multiply(p: Tensor, q: Tensor, out: Tensor) -> None:
    """Write P Q^T [n, m], of P [n, r] and Q [m, r], by elementwise operations: the same bits on all machines."""
    step = max(CACHE_SIZE // len(q), 1)
    scratch = out.new_empty(min(step, len(out)), len(q))
    for rows, block in zip(p.split(step), out.split(step), strict=True):
        torch.mul(rows[:, :1], q[:, 0], out=block)
        for index in range(1, p.shape[1]):
            block.add_(torch.mul(rows[:, index : index + 1], q[:, index], out=scratch[: len(block)]))


def _concatenate(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors] or [like[:0]])


def _length(part: slice) -> int:
    return part.stop - part.start
