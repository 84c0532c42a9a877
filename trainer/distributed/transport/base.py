"""How numbers travel between silos. What changes numbers is a transform; a wire only moves and combines them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.topology import Topology

T = TypeVar("T")

# From rows [K, n] of all silos' vectors, of which these are some columns, to one row [n]. The second argument sums a
# small tensor over those who have the other columns, in place.
ColumnReduction = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]

# Parts of a vector and their totals, in the order in which they come in.
ReducedChunks = Iterator[tuple[slice, Tensor]]

# From tags to the seed of a random stream of the round.
SeedFor = Callable[..., int]

SHARD_ALIGNMENT = 16  # numbers: slices begin on cache lines
CHUNK_SIZE = 1 << 22  # numbers that are summed at once: while one part travels, another one is made or used


class Transport(Protocol):
    """Abstract: combines one vector, or several rows, of every silo. Every rank must come to each call.

    Each replica of a silo moves its own slice of a vector, if silos are of one size, else their leaders move all.

    alignment             what the lengths of vectors must be multiples of
    bytes_sent       between the silos, by all of them, since the run began
    wait_seconds   that this rank stood still for totals
    stateful         whether ranks keep something of their own between rounds
    """

    alignment: int
    bytes_sent: int
    stateful: bool

    @property
    def wait_seconds(self) -> float: ...

    def start_round(self, seed_for: SeedFor) -> None:
        """From now on vectors are those of this round."""
        ...

    def chunks(self, length: int) -> list[slice]:
        """The parts that this rank moves of a vector: always the same, in their order; one that is empty for none."""
        ...

    def all_reduce_bytes(self, vector: Tensor, offset: int = 0) -> int:
        """The bytes that all silos together send for the sum of such a vector, or of a fragment from `offset` on."""
        ...

    def all_reduce_async(self, vector: Tensor, name: str, offset: int = 0) -> ReducedChunks:
        """Begins the sum over the silos; the totals of this rank's parts, which may take the vector's own place.

        The same bits come to all ranks with this part. The vector must not be touched before the last has come in. The
        name is that of its kind: vectors of one name add up over the rounds. If the vector is a fragment of a longer
        one, from `offset` on, the parts are told as places in that one.
        """
        ...

    def lookahead(self, vector: Tensor, name: str) -> Tensor:
        """This vector, when what this silo holds back of those of this name will have been subtracted from it.

        The vector itself, where nothing is held back, else a new one, equal on all ranks of the silo: a collective.
        """
        ...

    def all_gather(self, vector: Tensor) -> Tensor:
        """The vector of which each rank has what it moves, whole on all ranks of the silo, in place."""
        ...

    def sum_over_shards(self, value: float) -> float:
        """The sum of what the ranks of this silo have found in their parts of a vector."""
        ...

    def reduce_columns_bytes(self, rows: Tensor, count: int) -> int:
        """The bytes that all silos together send to combine `count` of such rows [k, n], of all of them, by columns."""
        ...

    def reduce_columns(self, rows: Tensor, rule: ColumnReduction) -> Tensor:
        """What the rule makes of all silos' rows [k, n], k each silo's own: one row [n], bit-equal on all ranks.

        Every silo applies the rule to a part of the columns: nobody holds all rows whole.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What this rank keeps, as a tree of live tensors; its names are others than those of the other ranks."""
        ...

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        """Takes over what all ranks of some silos kept of these parts, which are this rank's.

        These are of this silo alone, if it is the `same_world`; else every silo's state goes to one that there is now.
        """
        ...


class AllReduce:
    """The vectors as they are: all-reduces of their parts, or one exchange of columns."""

    stateful = False

    def __init__(self, topology: Topology):
        self.topology = topology
        self.alignment = topology.num_shards * SHARD_ALIGNMENT
        self.bytes_sent = 0
        self.waited = 0.0

    @property
    def wait_seconds(self) -> float:
        return self.waited

    def start_round(self, seed_for: SeedFor) -> None:
        pass

    def chunks(self, length: int) -> list[slice]:
        own = self.topology.shard_of(length)
        return chunks_of(own) or [slice(0, 0)]

    def all_reduce_bytes(self, vector: Tensor, offset: int = 0) -> int:
        # A ring all-reduce sends every byte 2 (S - 1) / S times from each of the S silos.
        return 2 * (self.topology.num_silos - 1) * vector.nbytes

    def all_reduce_async(self, vector: Tensor, name: str, offset: int = 0) -> ReducedChunks:
        silos, parts = self.topology.num_silos, [part for part in self.chunks(len(vector)) if part.stop > part.start]
        pieces = [(shift_slice(part, offset), vector[part]) for part in parts]
        if silos == 1:
            return iter(pieces)
        self.bytes_sent += self.all_reduce_bytes(vector)
        sums = [collectives.all_reduce_shard_async(piece, self.topology) for _, piece in pieces]
        return ((place, self.wait(total)) for (place, _), total in zip(pieces, sums, strict=True))

    def wait(self, pending: collectives.PendingCollective) -> Tensor:
        """What was on its way; the time that it takes is counted."""
        began = perf_counter()
        arrived = pending.wait()
        self.waited += perf_counter() - began
        return arrived

    def lookahead(self, vector: Tensor, name: str) -> Tensor:
        return vector

    def all_gather(self, vector: Tensor) -> Tensor:
        return collectives.all_gather_shards(vector, self.topology)

    def sum_over_shards(self, value: float) -> float:
        return float(collectives.all_reduce_in_silo(torch.tensor(value, dtype=torch.float64), self.topology))

    def reduce_columns_bytes(self, rows: Tensor, count: int) -> int:
        # Of every row all but one of S parts leave their silo; of the result each part goes to all others.
        silos = self.topology.num_silos
        return (count + silos) * (silos - 1) * columns_per_silo(rows.shape[1], silos) * rows.element_size()

    def reduce_columns(self, rows: Tensor, rule: ColumnReduction) -> Tensor:
        silos = self.topology.num_silos
        if silos == 1:
            return rule(rows, lambda tensor: tensor)
        counts = collectives.all_gather_silo_counts(len(rows), self.topology)
        width = columns_per_silo(rows.shape[1], silos)
        columns = rows.new_zeros(width)
        self.bytes_sent += self.reduce_columns_bytes(rows, sum(counts))
        if self.topology.is_leader:
            parts = torch.nn.functional.pad(rows, (0, width * silos - rows.shape[1])).view(-1, silos, width)
            received = collectives.all_to_all_between_leaders(parts.transpose(0, 1).contiguous(), counts, self.topology)
            columns = rule(received, lambda tensor: collectives.all_reduce_between_leaders(tensor, self.topology))
        return collectives.all_gather_between_silos(columns, self.topology)[: rows.shape[1]]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        pass


def columns_per_silo(columns: int, silos: int) -> int:
    """How many of so many columns each silo combines."""
    return -(-columns // silos)


def shift_slice(part: slice, by: int) -> slice:
    """The part, so much further on."""
    return slice(part.start + by, part.stop + by)


def chunks_of(own: slice) -> list[slice]:
    """The parts of a slice, in their order."""
    return [slice(start, min(start + CHUNK_SIZE, own.stop)) for start in range(own.start, own.stop, CHUNK_SIZE)]


def pipelined(items: Iterable[T]) -> Iterator[T]:
    """The items, each when the next has been made: what is on its way when it is made travels meanwhile."""
    last: list[T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last
