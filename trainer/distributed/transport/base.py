"""The base of transports, which combine vectors of the silos, and the one without compression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.compression import Codec
from trainer.distributed.topology import Topology

# From some columns [K, n] of the rows of all silos to one row [n]. The second argument sums a small tensor over the
# ranks with the other columns, in place.
ColumnReduction = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]

# Spans of a vector and their sums, as they arrive.
ReducedChunks = Iterator[tuple[slice, Tensor]]

# From tags to the seed of a random stream in this round.
SeedFor = Callable[..., int]

SHARD_ALIGNMENT = 16  # numbers of a cache line
CHUNK_SIZE = 1 << 22  # numbers of a collective: while one chunk travels, another is encoded or decoded


class Transport:
    """Base of transports: combines one vector, or several rows, of each silo.

    Methods that return a vector or a sum are collectives: all ranks call them, in the same order. A vector is this
    rank's part of the model, and travels between ranks with the same part. If all silos have as many copies, each sends
    its own shard of the vector, else the first copies send all. A subclass sums chunks of vectors; rows are combined
    without compression.

    alignment              of the lengths of vectors: their shards are then of one length, and start on cache lines
    bytes_sent             between the silos, by all of them, since the start of the run
    wait_seconds           for which this rank has waited for sums
    stateful               whether ranks have a state between rounds
    repeated_from          where the stretch of a vector begins that several parts of a copy hold, to its end; None: no
                           part does. The first of them sends it
    codec                  encodes what silos send; None if it needs no codec
    collectives_per_chunk  between the silos
    """

    stateful = False
    codec: Codec | None = None
    collectives_per_chunk = 1

    def __init__(self, topology: Topology):
        self.topology = topology
        self.alignment = topology.num_shards * SHARD_ALIGNMENT
        self.repeated_from: int | None = None
        self.bytes_sent = 0
        self.wait_seconds = 0.0

    def start_round(self, seed_for: SeedFor) -> None:
        """Start a round, from which the seeds of random encodings are derived."""

    def counted(self, length: int, offset: int = 0) -> int:
        """Return how many numbers of a vector this rank counts in norms and sends; another part does the rest.

        Args:
            length: of the vector
            offset: of the vector in a longer one, if it is a fragment
        """
        return length if self.topology.tensor_rank == 0 else self._not_repeated(length, offset)

    def chunks(self, length: int, offset: int = 0) -> list[slice]:
        """Return the spans of a vector, or fragment at `offset`, that this rank sends, in order."""
        shard = self.topology.shard_of(length)
        return chunks_of(slice(shard.start, min(shard.stop, self.counted(length, offset))))

    def all_reduce_bytes(self, vector: Tensor, offset: int = 0) -> int:
        """Return the bytes that all silos send for the sum of such a vector in each part, or fragment at `offset`."""
        copies, total = range(self.topology.num_shards), 0
        shards = [shift_slice(self.topology.shard_at(copy, len(vector)), offset) for copy in copies]
        for parts, counted in self._counted_by_parts(len(vector), offset):
            sent = (slice(shard.start, min(shard.stop, offset + counted)) for shard in shards)
            total += parts * self.chunk_bytes(list(chain.from_iterable(map(chunks_of, sent))), vector.element_size())
        return total

    def chunk_bytes(self, spans: Sequence[slice], element_size: int) -> int:
        """Return the bytes that all silos send for the sums of some chunks.

        Args:
            spans: of the chunks, in the whole vector
            element_size: of its numbers
        """
        raise NotImplementedError

    def all_reduce_async(self, vector: Tensor, name: str, offset: int = 0) -> ReducedChunks:
        """Start the sum of a vector over the silos.

        Args:
            vector: must not be touched until all sums have arrived, which may use its memory
            name: of the residuals: vectors of one name add up over the rounds
            offset: of the vector in a longer one, if it is a fragment

        Returns:
            the spans of this rank, shifted by the offset, and their sums, with the same bits on all ranks
        """
        chunks = [(shift_slice(part, offset), vector[part]) for part in self.chunks(len(vector), offset)]
        if self.topology.num_silos == 1:
            return ((span, self.flush(name, span, values)) for span, values in chunks)
        self.bytes_sent += self.all_reduce_bytes(vector, offset)
        tasks = [self.sum_chunk(name, span, values) for span, values in chunks]
        return collectives.finish_tasks([(task, next(task)) for task in tasks], self.collectives_per_chunk, self._wait)

    def sum_chunk(self, name: str, span: slice, values: Tensor) -> collectives.Task:
        """Sum a chunk over the silos, and yield its span and its sum.

        Args:
            name: of the vector
            span: in the whole vector
            values: the vector's memory at the span
        """
        raise NotImplementedError

    def flush(self, name: str, span: slice, values: Tensor) -> Tensor:
        """Return the values of a chunk where there is a single silo, with what was not sent when there were more."""
        return values

    def lookahead(self, vector: Tensor, name: str) -> Tensor:
        """Return a vector less the residuals of this silo for this name, the same on all its ranks.

        It is the vector itself if the transport has no residuals, and a new one otherwise.
        """
        return vector

    def all_gather(self, vector: Tensor, offset: int = 0) -> Tensor:
        """Complete a vector, or fragment at `offset`, of which each rank of this silo has what it sends, in place."""
        return self._repeat(collectives.all_gather_shards(vector, self.topology), offset)

    def all_reduce_in_silo(self, value: float) -> float:
        """Sum a number over the ranks of this silo."""
        return float(collectives.all_reduce_in_silo(torch.tensor(value, dtype=torch.float64), self.topology))

    def norm_over_parts(self, norm: float) -> float:
        """Return the 2-norm of a vector of the whole model from that of this rank's part, which may be no number."""
        return float(collectives.norm_over_parts(torch.tensor(norm, dtype=torch.float64), 2, self.topology))

    def all_reduce_columns_bytes(self, rows: Tensor, count: int) -> int:
        """Return the bytes that all silos send to combine `count` such rows [., n] of all silos, in each part."""
        # All but one of S parts of each row leave their silo, and each part of the result goes to all other silos.
        silos = self.topology.num_silos
        by_parts = self._counted_by_parts(rows.shape[1])
        width = sum(parts * columns_per_silo(counted, silos) for parts, counted in by_parts)
        return (count + silos) * (silos - 1) * width * rows.element_size()

    def all_reduce_columns(self, rows: Tensor, rule: ColumnReduction) -> Tensor:
        """Combine the rows [k, n] of each silo, k of its own, to one row [n] with the same bits on all copies.

        Each silo applies the rule to some of the columns of each part, so that no rank holds all rows.
        """
        whole = rows.new_empty(rows.shape[1])
        counted = self.counted(len(whole))
        counts = collectives.all_gather_silo_counts(len(rows), self.topology) if self.topology.num_silos > 1 else []
        self.bytes_sent += self.all_reduce_columns_bytes(rows, sum(counts))
        whole[:counted] = self._reduce_columns(rows[:, :counted], counts, rule)
        return self._repeat(whole)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank, as a tree of live tensors; no two ranks use the same names."""
        return {}

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        """Load the states of all ranks of some silos.

        Args:
            states: of this silo if it is the same world; else the state of each silo goes to one of the silos now
            parts: the spans that this rank sends
            same_world: whether the sizes of the silos are those of the states
        """

    def _reduce_columns(self, rows: Tensor, counts: list[int], rule: ColumnReduction) -> Tensor:
        """Combine the rows of each silo, of columns that this part alone counts."""
        silos, topology = self.topology.num_silos, self.topology
        if silos == 1:
            return rule(rows, lambda tensor: collectives.sum_over_parts(tensor, topology))

        def sum_columns(tensor: Tensor) -> Tensor:
            return collectives.sum_over_parts(collectives.all_reduce_between_first_copies(tensor, topology), topology)

        width = columns_per_silo(rows.shape[1], silos)
        columns = rows.new_zeros(width)
        if topology.is_first_copy:
            parts = torch.nn.functional.pad(rows, (0, width * silos - rows.shape[1])).view(-1, silos, width)
            received = collectives.all_to_all_between_first_copies(parts.transpose(0, 1).contiguous(), counts, topology)
            columns = rule(received, sum_columns)
        return collectives.all_gather_between_silos(columns, topology)[: rows.shape[1]]

    def _counted_by_parts(self, length: int, offset: int = 0) -> list[tuple[int, int]]:
        """Return how many parts count the whole of a vector, and how many what no other part has; with the numbers."""
        dims = self.topology.dims
        return [(dims.shard, length), (dims.shard * (dims.tensor - 1), self._not_repeated(length, offset))]

    def _not_repeated(self, length: int, offset: int) -> int:
        """Return how many of the first numbers of a vector are held by one part alone."""
        return length if self.repeated_from is None else min(max(self.repeated_from - offset, 0), length)

    def _repeat(self, vector: Tensor, offset: int = 0) -> Tensor:
        """Give the parts that hold the same numbers those of the first, in place."""
        if self.repeated_from is not None:
            collectives.broadcast_over_tensor_ranks(vector[max(self.repeated_from - offset, 0) :], self.topology)
        return vector

    def _wait(self, pending: collectives.PendingCollective) -> Tensor:
        """Wait for a collective, and count the time."""
        began = perf_counter()
        output = pending.wait()
        self.wait_seconds += perf_counter() - began
        return output


class AllReduce(Transport):
    """Vectors without compression: an all-reduce of each chunk."""

    def chunk_bytes(self, spans: Sequence[slice], element_size: int) -> int:
        # A ring all-reduce sends every byte 2 (S - 1) / S times from each of the S silos.
        return 2 * (self.topology.num_silos - 1) * sum(span.stop - span.start for span in spans) * element_size

    def sum_chunk(self, name: str, span: slice, values: Tensor) -> collectives.Task:
        yield span, (yield collectives.all_reduce_async(values, self.topology.inter_silo_group))


def columns_per_silo(columns: int, silos: int) -> int:
    """Return the number of columns that each silo combines."""
    return -(-columns // silos)


def shift_slice(part: slice, by: int) -> slice:
    """Shift a slice."""
    return slice(part.start + by, part.stop + by)


def chunks_of(shard: slice) -> list[slice]:
    """Cut a shard into chunks of one collective each, in order."""
    return [slice(start, min(start + CHUNK_SIZE, shard.stop)) for start in range(shard.start, shard.stop, CHUNK_SIZE)]
