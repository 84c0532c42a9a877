"""The batches of one client, as one replica of its silo gets them.

The order of examples is a pure function of (seed, client, epoch), and the position in it is a number of steps. So a run
can be resumed at any step, with any number of replicas: the batches of the silo stay the same, and only their division
among the replicas changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
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

# Returns the examples of these ids in an epoch, on the device that trains.
Fetch = Callable[[Tensor, int], Examples]


@dataclass(frozen=True)
class BatchShard:
    """Divides a silo's batch among its replicas, and a replica's shard into micro-batches.

    A replica gets consecutive examples of the batch. Shards differ by at most one example.

    Attributes:
        replica: index of this replica in its silo.
        num_replicas: number of replicas of the silo.
        micro_batch_size: most examples of a micro-batch; None for the whole shard.
        min_examples: fewest examples of a shard. A last batch with smaller shards joins the batch before it.
    """

    replica: int = 0
    num_replicas: int = 1
    micro_batch_size: int | None = None
    min_examples: int = 0

    def range_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return this replica's range of the batch [start, stop)."""
        first, last = ((stop - start) * edge // self.num_replicas for edge in (self.replica, self.replica + 1))
        return start + first, start + last

    def fetched_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return this replica's range of the batch, or if that is empty, the range of an example next to it."""
        first, last = self.range_of(start, stop)
        first = min(first, stop - 1)
        return first, max(last, first + 1)

    def bounds(self, examples: int, batch_size: int) -> list[int]:
        """Return the boundaries of the batches of an epoch: [0, batch_size, ..., examples]."""
        bounds = [*range(0, examples, batch_size), examples]
        if len(bounds) > 2 and bounds[-1] - bounds[-2] < self.min_examples * self.num_replicas:
            del bounds[-2]
        return bounds


@dataclass(slots=True)
class ReplicaBatch:
    """A replica's share of a batch.

    Attributes:
        micro_batches: at least one. No user's code can be expected to take an empty one, so a replica without examples
            gets another's, at a `replica_weight` of 0.
        examples: number of examples of the silo's whole batch.
        weight: their number, or the sum of their weights, times their units if these differ; equal on all replicas.
        replica_weight: likewise of this replica's examples.
    """

    micro_batches: list[MicroBatch]
    examples: int
    weight: float
    replica_weight: float


class ClientBatches:
    """The endless batches of one client, epoch after epoch. A batch never spans two epochs.

    Args:
        fetch: returns the examples of ids.
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
        fetch: Fetch,
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
        self.fetch, self.client, self.shard, self.seed, self.weights = fetch, client, shard, seed, weights
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
        stop = start + steps
        while start < stop:
            epoch, first = divmod(start, self.steps_per_epoch)
            last = min(first + stop - start, self.steps_per_epoch)
            yield from self._epoch_batches(epoch, self.bounds[first : last + 1])
            start += last - first

    def _epoch_batches(self, epoch: int, bounds: list[int]) -> Iterator[ReplicaBatch]:
        order = self._order(epoch)
        fetched = self._fetch(order, epoch, [self.shard.fetched_range(begin, end) for begin, end in pairwise(bounds)])
        for (begin, end), columns in zip(pairwise(bounds), fetched, strict=True):
            weight, replica_weight = (
                self._weight(order, begin, end),
                self._weight(order, *self.shard.range_of(begin, end)),
            )
            yield ReplicaBatch(self._micro_batches(columns), end - begin, weight, replica_weight)

    def _order(self, epoch: int) -> Tensor:
        if self.is_sequential:
            return torch.arange(len(self.ids))
        return torch.randperm(len(self.ids), generator=generator(self.seed, "order", self.client, epoch))

    def _weight(self, order: Tensor, begin: int, end: int) -> float:
        """Return the weight of a range of an epoch, the same bits on all replicas and after a restart."""
        if self.amounts is None:
            return end - begin
        return self.amounts[order[begin:end]].sum(dtype=torch.float64).item()

    def _fetch(self, order: Tensor, epoch: int, ranges: list[tuple[int, int]]) -> Iterator[MicroBatch]:
        for columns, sizes in self.prefetch(self._blocks(order, epoch, ranges)):
            yield from zip(*(split(column, sizes) for column in columns), strict=True)

    def _blocks(self, order: Tensor, epoch: int, ranges: list[tuple[int, int]]) -> Iterator[PrefetchBlock]:
        position, block_batches = 0, 1
        while position < len(ranges):
            started = perf_counter()
            block = ranges[position : position + block_batches]
            columns = self._columns(torch.cat([order[begin:end] for begin, end in block]), epoch)
            sizes = [end - begin for begin, end in block]
            self.seconds += perf_counter() - started
            yield columns, sizes
            position += len(block)
            if not self.is_read_by_batch:
                block_batches = max(1, BLOCK_BYTES * len(block) // max(nbytes(columns[0]), 1))

    def _columns(self, positions: Tensor, epoch: int) -> MicroBatch:
        """Return the client's examples at these positions, with their weights if there are any."""
        examples = self.fetch(self.ids[positions], epoch)
        return (
            examples
            if self.weights is None
            else (*examples, self.weights[positions].to(first_tensor(examples[0]).device))
        )

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
