"""The batches of one client, as one replica of its silo gets them.

The order of examples is a pure function of (seed, client, epoch), and the position in it is a number of steps. So a run
can be resumed at any step, with any number of replicas: the batches of the silo stay the same, and only their division
among the replicas changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice, pairwise, tee
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from trainer.data.loading.prefetch import PrefetchBlock, no_prefetch
from trainer.utils.seeding import generator
from trainer.utils.tensor_trees import Tree, first_tensor, map_tensors, nbytes, num_examples, split

BLOCK_BYTES = 4 << 20  # small batches are fetched together: an index_select per batch costs 5 % of a small step
ALIGNMENT = 64  # bytes, to which torch aligns new tensors

Examples = tuple[Tree, Tree]
MicroBatch = tuple[Tree, ...]  # inputs, targets and, if examples have weights, weights

# Yields the examples of these ids in these epochs, on the device that trains. It may take some of them in advance.
Read = Callable[[Iterator[tuple[Tensor, int]]], Iterator[Examples]]


@dataclass(frozen=True)
class BatchShard:
    """Divides a silo's batch among its replicas, and a replica's shard into micro-batches.

    A replica gets consecutive examples of the batch. Shards differ by at most one example.

    Attributes:
        replica: index of this replica in its silo.
        num_replicas: number of replicas of the silo.
        micro_batch_size: most examples of a micro-batch; None for the whole shard.
        min_examples: fewest examples of a shard. A last batch with smaller shards joins the batch before it.
        is_even: whether all replicas get as many micro-batches, since each forward pass is a collective.
    """

    replica: int = 0
    num_replicas: int = 1
    micro_batch_size: int | None = None
    min_examples: int = 0
    is_even: bool = False

    def range_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return this replica's range of the batch [start, stop)."""
        first, last = ((stop - start) * edge // self.num_replicas for edge in (self.replica, self.replica + 1))
        return start + first, start + last

    def fetched_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return this replica's range of the batch, or if that is empty, the range of an example next to it."""
        first, last = self.range_of(start, stop)
        first = min(first, stop - 1)
        return first, max(last, first + 1)

    def num_fillers(self, examples: int, micro_batches: int) -> int:
        """Return how many forward passes this replica makes beside its own, for another with more micro-batches.

        Args:
            examples: of the silo's batch.
            micro_batches: of this replica.
        """
        if not self.is_even or self.micro_batch_size is None:
            return 0
        largest = -(-examples // self.num_replicas)
        return max(-(-largest // self.micro_batch_size), 1) - micro_batches

    def bounds(self, examples: int, batch_size: int) -> list[int]:
        """Return the boundaries of the batches of an epoch: [0, batch_size, ..., examples]."""
        bounds = [*range(0, examples, batch_size), examples]
        if len(bounds) > 2 and bounds[-1] - bounds[-2] < self.min_examples * self.num_replicas:
            del bounds[-2]
        return bounds


@dataclass(frozen=True, slots=True)
class BatchPlace:
    """Where a batch of the silo is: the places [begin, end) in the order of an epoch."""

    order: Tensor
    epoch: int
    begin: int
    end: int


@dataclass(slots=True)
class ReplicaBatch:
    """A replica's share of a batch.

    Attributes:
        micro_batches: at least one. No user's code can be expected to take an empty one, so a replica without examples
            gets another's, at a `replica_weight` of 0.
        examples: number of examples of the silo's whole batch.
        weight: their number, or the sum of their weights, times their units if these differ; equal on all replicas.
        replica_weight: likewise of this replica's examples.
        fillers: forward passes that follow and add nothing, see `BatchShard.is_even`.
    """

    micro_batches: list[MicroBatch]
    examples: int
    weight: float
    replica_weight: float
    fillers: int = 0


class ClientBatches:
    """The endless batches of one client, epoch after epoch. A batch never spans two epochs.

    Args:
        read: yields the examples of ids.
        ids: the client's examples, int64 [n].
        client: number of the client.
        batch_size: examples of a batch of the whole silo.
        shard: this replica's part of a batch.
        seed: seed of the run.
        weights: weight of each of the examples, float32 [n]; None for equal weights.
        prefetch: passes on blocks of batches that are fetched together.
        is_sequential: whether to keep the order of the examples instead of shuffling them.
        units: of each of the examples, those that count in the loss, float32 [n]; None if all have the same number.
        is_read_by_batch: whether to fetch batches one at a time, instead of several small ones together.

    Attributes:
        seconds: time spent fetching so far.
    """

    def __init__(
        self,
        read: Read,
        ids: np.ndarray,
        client: int,
        batch_size: int,
        shard: BatchShard,
        seed: int,
        weights: Tensor | None = None,
        prefetch: Callable[[Iterator[PrefetchBlock]], Iterator[PrefetchBlock]] = no_prefetch,
        is_sequential: bool = False,
        units: Tensor | None = None,
        is_read_by_batch: bool = False,
    ):
        self.read, self.client, self.shard, self.seed, self.weights = read, client, shard, seed, weights
        self.prefetch, self.is_sequential, self.seconds = prefetch, is_sequential, 0.0
        self.is_read_by_batch = is_read_by_batch
        self.amounts = weights if units is None else units if weights is None else units * weights
        self.ids = torch.from_numpy(ids)
        self.bounds = shard.bounds(len(ids), batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.bounds) - 1

    def batches(self, start: int, steps: int) -> Iterator[ReplicaBatch]:
        """Yield the batches number `start` to `start + steps` - 1."""
        places, wanted = tee(self._places(start, start + steps))
        for place, columns in zip(places, self._fetch(wanted), strict=True):
            begin, end = place.begin, place.end
            weight = self._weight(place.order, begin, end)
            replica_weight = self._weight(place.order, *self.shard.range_of(begin, end))
            micro_batches = self._micro_batches(columns)
            fillers = self.shard.num_fillers(end - begin, len(micro_batches))
            yield ReplicaBatch(micro_batches, end - begin, weight, replica_weight, fillers)

    def _places(self, start: int, stop: int) -> Iterator[BatchPlace]:
        """Yield where the batches are."""
        while start < stop:
            epoch, first = divmod(start, self.steps_per_epoch)
            last = min(first + stop - start, self.steps_per_epoch)
            order = self._order(epoch)
            for begin, end in pairwise(self.bounds[first : last + 1]):
                yield BatchPlace(order, epoch, begin, end)
            start += last - first

    def _order(self, epoch: int) -> Tensor:
        if self.is_sequential:
            return torch.arange(len(self.ids))
        return torch.randperm(len(self.ids), generator=generator(self.seed, "order", self.client, epoch))

    def _weight(self, order: Tensor, begin: int, end: int) -> float:
        """Return the weight of a range of an epoch, the same bits on all replicas and after a restart."""
        if self.amounts is None:
            return end - begin
        return self.amounts[order[begin:end]].sum(dtype=torch.float64).item()

    def _fetch(self, places: Iterator[BatchPlace]) -> Iterator[MicroBatch]:
        """Yield this replica's part of the batches."""
        for columns, sizes in self.prefetch(self._blocks(places)):
            yield from zip(*(split(column, sizes) for column in columns), strict=True)

    def _blocks(self, places: Iterator[BatchPlace]) -> Iterator[PrefetchBlock]:
        """Read batches in blocks, of one epoch each: the first is a batch, and shows how many make a block."""
        blocks, wanted = tee(self._grouped(places))
        fetched = self.read((self.ids[positions], epoch) for positions, epoch, _ in wanted)
        self.block_batches = 1
        while True:
            started = perf_counter()
            block = next(blocks, None)
            if block is None:
                return
            positions, _, sizes = block
            columns = self._with_weights(next(fetched), positions)
            self.seconds += perf_counter() - started
            yield columns, sizes
            if not self.is_read_by_batch:
                self.block_batches = max(1, BLOCK_BYTES * len(sizes) // max(nbytes(columns[0]), 1))

    def _grouped(self, places: Iterator[BatchPlace]) -> Iterator[tuple[Tensor, int, list[int]]]:
        """Yield the positions in `ids` of each block's examples, their epoch, and the sizes of its batches."""
        for epoch, of_epoch in groupby(places, lambda place: place.epoch):
            while block := list(islice(of_epoch, self.block_batches)):
                ranges = [self.shard.fetched_range(place.begin, place.end) for place in block]
                order = block[0].order
                positions = torch.cat([order[begin:end] for begin, end in ranges])
                yield positions, epoch, [end - begin for begin, end in ranges]

    def _with_weights(self, examples: Examples, positions: Tensor) -> MicroBatch:
        """Return the examples at these positions with their weights, if there are any."""
        if self.weights is None:
            return examples
        return (*examples, self.weights[positions].to(first_tensor(examples[0]).device))

    def _micro_batches(self, columns: MicroBatch) -> list[MicroBatch]:
        size = self.shard.micro_batch_size
        if size is None or num_examples(columns[0]) <= size:
            return [_align(columns)]
        return [_align(part) for part in zip(*(split(column, size) for column in columns), strict=True)]


def _align(columns: MicroBatch) -> MicroBatch:
    """Copy floating-point columns that are not aligned like new tensors.

    MKL on some processors, and cuBLAS, sum in another order for another alignment. After a restart a batch lies
    elsewhere in its block, and the bits must not depend on that.
    """
    return tuple(map_tensors(_aligned, column) for column in columns)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_floating_point() and tensor.data_ptr() % ALIGNMENT else tensor
