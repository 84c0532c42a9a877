"""The batches of one client, as one replica of its silo sees them.

The order of examples is a pure function of (seed, client, epoch) and the place in it is a number of steps, so a run
continues anywhere, also with another number of replicas: the batches of the silo stay the same, only their split
between the replicas changes.
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

BLOCK_BYTES = 4 << 20  # small batches are fetched together: one index_select, not many, is 5 % of a small step
ALIGNMENT = 64  # bytes, at which torch lets a tensor begin

Examples = tuple[Tensor, Tensor]
MicroBatch = tuple[Tensor, ...]  # inputs, targets and, if examples have any, weights

# The examples of these ids, as they are in an epoch, where they are trained on.
Fetch = Callable[[Tensor, int], Examples]


@dataclass(frozen=True)
class BatchShard:
    """How a silo's batch is divided: among its replicas, and on each into micro-batches.

    A replica gets consecutive examples of the batch, and shares differ by at most one example. `min_examples` is the fewest
    examples a share may have: a last batch that would give fewer joins the one before.
    """

    replica: int = 0
    num_replicas: int = 1
    micro_batch_size: int | None = None
    min_examples: int = 0

    def range_of(self, start: int, stop: int) -> tuple[int, int]:
        """The replica's part of the batch [start, stop)."""
        first, last = ((stop - start) * edge // self.num_replicas for edge in (self.replica, self.replica + 1))
        return start + first, start + last

    def bounds(self, examples: int, batch_size: int) -> list[int]:
        """Where the batches of an epoch begin and end: [0, batch_size, ..., examples]."""
        bounds = [*range(0, examples, batch_size), examples]
        if len(bounds) > 2 and bounds[-1] - bounds[-2] < self.min_examples * self.num_replicas:
            del bounds[-2]
        return bounds


@dataclass(slots=True)
class ReplicaBatch:
    """A replica's micro-batches, at least one though it may be empty.

    examples  the examples of the silo's whole batch
    weight    what they count together: their number, or the sum of their weights, equal on all replicas
    replica_weight       what those of this replica count
    """

    micro_batches: list[MicroBatch]
    examples: int
    weight: float
    replica_weight: float


class ClientBatches:
    """The endless batches of one client, epoch after epoch; epochs never mix in a batch.

    `ids` are the client's examples, which `fetch` gives; `batch_size` counts examples of the whole silo, None is all of
    them. `weights` (float32) are what each of the examples counts; None: all the same. `prefetch` passes on blocks of
    batches that are fetched together. Examples `is_sequential` are not shuffled. `seconds` are those spent fetching so far.
    """

    def __init__(
        self,
        fetch: Fetch,
        ids: np.ndarray,
        client: int,
        batch_size: int | None,
        shard: BatchShard,
        seed: int,
        weights: Tensor | None = None,
        prefetch: Callable[[Iterator[PrefetchBlock]], Iterator[PrefetchBlock]] = no_prefetch,
        is_sequential: bool = False,
    ):
        self.fetch, self.client, self.shard, self.seed, self.weights = fetch, client, shard, seed, weights
        self.prefetch, self.is_sequential, self.seconds = prefetch, is_sequential, 0.0
        self.ids = torch.from_numpy(ids)
        self.bounds = shard.bounds(len(ids), batch_size or len(ids))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.bounds) - 1

    def batches(self, start: int, steps: int) -> Iterator[ReplicaBatch]:
        """Batches number `start` to `start + steps` of the stream."""
        stop = start + steps
        while start < stop:
            epoch, first = divmod(start, self.steps_per_epoch)
            last = min(first + stop - start, self.steps_per_epoch)
            yield from self._epoch_batches(epoch, self.bounds[first : last + 1])
            start += last - first

    def _epoch_batches(self, epoch: int, bounds: list[int]) -> Iterator[ReplicaBatch]:
        order = self._order(epoch)
        shares = [self.shard.range_of(begin, end) for begin, end in pairwise(bounds)]
        fetched = self._fetch(order, epoch, shares)
        for (begin, end), (start, last), columns in zip(pairwise(bounds), shares, fetched, strict=True):
            weight, own = self._weight(order, begin, end), self._weight(order, start, last)
            yield ReplicaBatch(self._micro_batches(columns, last - start), end - begin, weight, own)

    def _order(self, epoch: int) -> Tensor:
        if self.is_sequential:
            return torch.arange(len(self.ids))
        return torch.randperm(len(self.ids), generator=generator(self.seed, "order", self.client, epoch))

    def _weight(self, order: Tensor, begin: int, end: int) -> float:
        """What these examples of an epoch count together: the same bits on all replicas, and after a restart."""
        if self.weights is None:
            return end - begin
        return self.weights[order[begin:end]].sum(dtype=torch.float64).item()

    def _fetch(self, order: Tensor, epoch: int, ranges: list[tuple[int, int]]) -> Iterator[MicroBatch]:
        for columns, sizes in self.prefetch(self._blocks(order, epoch, ranges)):
            yield from zip(*(column.split(sizes) for column in columns), strict=True)

    def _blocks(self, order: Tensor, epoch: int, ranges: list[tuple[int, int]]) -> Iterator[PrefetchBlock]:
        position, together = 0, 1
        while position < len(ranges):
            began = perf_counter()
            block = ranges[position : position + together]
            columns = self._columns(torch.cat([order[begin:end] for begin, end in block]), epoch)
            sizes = [end - begin for begin, end in block]
            self.seconds += perf_counter() - began
            yield columns, sizes
            position += len(block)
            together = max(1, BLOCK_BYTES * len(block) // max(columns[0].nbytes, 1))

    def _columns(self, positions: Tensor, epoch: int) -> MicroBatch:
        """The client's examples at these places, with their weights if there are any."""
        examples = self.fetch(self.ids[positions], epoch)
        return examples if self.weights is None else (*examples, self.weights[positions].to(examples[0].device))

    def _micro_batches(self, columns: MicroBatch, own: int) -> list[MicroBatch]:
        size = self.shard.micro_batch_size
        if size is None or own <= size:
            return [_align(columns)]
        return [_align(part) for part in zip(*(column.split(size) for column in columns), strict=True)]


def _align(columns: MicroBatch) -> MicroBatch:
    """The columns, those of floating numbers where a tensor of their own would begin.

    MKL on some processors, and cuBLAS, add a product up in another order where a matrix is aligned otherwise, and after
    a restart a batch lies in another place of its block.
    """
    return tuple(
        column.clone() if column.is_floating_point() and column.data_ptr() % ALIGNMENT else column for column in columns
    )
