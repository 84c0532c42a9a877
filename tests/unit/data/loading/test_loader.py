"""The batches of a client are those of its silo, divided: the same examples in one order for any replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import TensorSource
from trainer.data.loading import loader
from trainer.data.loading.loader import BatchShard, ClientBatches, ReplicaBatch

laws = settings(deadline=None, max_examples=80)
counts = st.integers(1, 40)
batch_sizes = st.none() | st.integers(1, 45)
micro_sizes = st.none() | st.integers(1, 6)
replica_numbers = st.integers(1, 5)

FIRST_ID = 100  # the client's ids are not their positions


def stream(
    examples: int,
    batch_size: int | None,
    share: BatchShard | None = None,
    client: int = 3,
    seed: int = 0,
) -> ClientBatches:
    """Return the stream of a client with examples 100, 101, ...: an input is its id, a target ten times that.

    Without a batch size a batch has all of them.
    """
    numbers = torch.arange(FIRST_ID + examples)
    source = TensorSource(numbers.float()[:, None].expand(-1, 3).contiguous(), numbers * 10)
    ids = np.arange(FIRST_ID, FIRST_ID + examples)
    return ClientBatches(
        lambda wanted: (source.fetch(some) for some, _ in wanted),
        ids,
        client,
        batch_size or examples,
        share or BatchShard(),
        seed,
    )


def seen(batch: ReplicaBatch) -> list[int]:
    """Return the ids of a batch, in order, after checking that inputs and targets belong together."""
    ids = []
    for inputs, targets in batch.micro_batches:
        assert inputs.shape == (len(targets), 3)
        assert torch.equal(inputs[:, 0] * 10, targets.float())
        ids += (targets // 10).tolist()
    return ids


def epoch(examples: int, batch_size: int | None, **choices) -> list[list[int]]:
    """Return the batches of the first epoch."""
    one = stream(examples, batch_size, **choices)
    return [seen(batch) for batch in one.batches(0, one.steps_per_epoch)]


@contextmanager
def fetched_at_once(block_bytes: int) -> Iterator[None]:
    """Limit the number of bytes that are fetched together."""
    before = loader.BLOCK_BYTES
    loader.BLOCK_BYTES = block_bytes
    try:
        yield
    finally:
        loader.BLOCK_BYTES = before


@laws
@given(counts, batch_sizes, replica_numbers, micro_sizes, st.integers(0, 2), st.integers(0, 7), st.integers(1, 9))
def test_replicas_divide_the_batches_of_one_replica(
    examples: int, batch_size: int | None, replicas: int, micro: int | None, least: int, start: int, steps: int
):
    """Joined in the order of the replicas, their parts are the batch of a single replica."""
    shares = [BatchShard(replica, replicas, micro, least) for replica in range(replicas)]
    # Whether a small last batch joins the one before depends on the number of replicas, so both use the same rule.
    whole = BatchShard(0, 1, None, least * replicas)
    parts = [list(stream(examples, batch_size, share).batches(start, steps)) for share in shares]
    batches = list(stream(examples, batch_size, whole).batches(start, steps))
    assert [len(mine) for mine in parts] == [steps] * replicas
    for number, batch in enumerate(batches):
        mine = [part[number] for part in parts]
        sizes = [one.replica_weight for one in mine]
        counted = [one for one in mine if one.replica_weight]
        assert [example for one in counted for example in seen(one)] == seen(batch)
        assert all(one.examples == len(seen(batch)) for one in mine)
        assert [max(size, 1) for size in sizes] == [len(seen(one)) for one in mine]
        assert max(sizes) - min(sizes) <= 1
        for one in mine:
            cut = [len(targets) for _, targets in one.micro_batches]
            assert cut and 0 not in cut
            assert micro is None or max(cut) <= micro


@laws
@given(counts, batch_sizes, st.integers(0, 3), st.sampled_from([1, 100, 1 << 20]))
def test_an_epoch_is_every_example_once(examples: int, batch_size: int | None, number: int, block_bytes: int):
    """Batches are full except the last, and epochs do not mix, whatever number of batches is fetched together."""
    with fetched_at_once(block_bytes):
        one = stream(examples, batch_size)
        batches = [seen(batch) for batch in one.batches(number * one.steps_per_epoch, one.steps_per_epoch)]
    size = min(batch_size or examples, examples)
    assert one.steps_per_epoch == len(batches) == -(-examples // size)
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert sorted(example for batch in batches for example in batch) == list(range(FIRST_ID, FIRST_ID + examples))


@laws
@given(counts, batch_sizes, st.integers(0, 12), st.integers(1, 12), st.sampled_from([1, 100, 1 << 20]))
def test_starting_later_is_skipping(examples: int, batch_size: int | None, start: int, steps: int, block_bytes: int):
    """Batches start to start + steps are the same whether the earlier ones were drawn or not."""
    with fetched_at_once(block_bytes):
        late = [seen(batch) for batch in stream(examples, batch_size).batches(start, steps)]
        through = [seen(batch) for batch in stream(examples, batch_size).batches(0, start + steps)]
    assert late == through[start:]


@laws
@given(counts, batch_sizes, micro_sizes, st.integers(0, 7))
def test_a_batch_begins_where_a_tensor_of_its_own_does(
    examples: int, batch_size: int | None, micro: int | None, start: int
):
    """It is aligned like a new tensor, since the bits of a product may depend on the alignment."""
    for batch in stream(examples, batch_size, BatchShard(micro_batch_size=micro)).batches(start, 5):
        assert all(inputs.data_ptr() % 64 == 0 for inputs, _ in batch.micro_batches)


def test_orders_differ_by_seed_client_and_epoch():
    """They are the permutations of their random streams."""
    one = stream(30, None)
    orders = [seen(batch) for batch in one.batches(0, 2)]
    orders += [epoch(30, None, client=4)[0], epoch(30, None, seed=1)[0]]
    assert len({tuple(order) for order in orders}) == 4
    permutation = torch.randperm(30, generator=loader.generator(0, "order", 3, 1)) + FIRST_ID
    assert orders[1] == permutation.tolist()


def test_a_golden_order():
    """Old runs may be resumed, so their order of examples must never change."""
    assert epoch(8, 3, client=0) == [[102, 104, 107], [106, 101, 100], [103, 105]]


def test_the_order_does_not_depend_on_the_batch_size():
    assert [[*chain(*epoch(20, size))] for size in (1, 7, None)] == [epoch(20, None)[0]] * 3


@laws
@given(counts, st.integers(1, 45), replica_numbers, st.integers(0, 3))
def test_a_last_batch_that_is_too_small_joins_the_one_before(examples: int, batch_size: int, replicas: int, least: int):
    """No replica has fewer than `least` examples of a last batch, unless there is no batch before it."""
    share = BatchShard(0, replicas, None, least)
    bounds = share.bounds(examples, batch_size)
    assert bounds[0] == 0 and bounds[-1] == examples
    sizes = [end - begin for begin, end in pairwise(bounds)]
    assert all(size == batch_size for size in sizes[:-1])
    rest = examples % batch_size or batch_size
    joins = examples > batch_size and rest < least * replicas
    assert sizes[-1] == (batch_size + rest if joins else min(rest, examples))


@pytest.mark.parametrize(("replicas", "parts"), [(1, [5]), (2, [2, 3]), (3, [1, 2, 2]), (7, [0, 1, 1, 0, 1, 1, 1])])
def test_shares_are_consecutive(replicas: int, parts: list[int]):
    """They divide the batch [10, 15); a replica may have none."""
    edges = [BatchShard(replica, replicas).range_of(10, 15) for replica in range(replicas)]
    assert edges[0][0] == 10 and edges[-1][1] == 15
    assert all(before[1] == after[0] for before, after in pairwise(edges))
    assert [last - first for first, last in edges] == parts


@pytest.mark.parametrize(("replicas", "without"), [(3, [0]), (7, [0, 1, 2, 4, 5]), (2, [])])
def test_a_replica_without_examples_gets_one_of_another(replicas: int, without: list[int]):
    """It weighs nothing. The backward pass is a collective, and an empty batch is more than a model has to take."""
    (whole,) = stream(2, None, BatchShard()).batches(0, 1)
    for replica in range(replicas):
        (batch,) = stream(2, None, BatchShard(replica, replicas)).batches(0, 1)
        ((inputs, targets),) = batch.micro_batches
        assert len(inputs) == len(targets) == 1
        assert inputs[0].tolist() in whole.micro_batches[0][0].tolist()
        assert (batch.examples, batch.weight, batch.replica_weight) == (2, 2, 0 if replica in without else 1)


def test_memory_is_bounded_by_the_block():
    """Batches are fetched together up to the size of a block, and at least one."""
    taken: list[int] = []

    class Counted(TensorSource):
        def fetch(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            taken.append(len(ids))
            return super().fetch(ids)

    source = Counted(torch.zeros(64, 25), torch.arange(64))
    one = ClientBatches(lambda wanted: (source.fetch(ids) for ids, _ in wanted), np.arange(64), 0, 4, BatchShard(), 0)
    with fetched_at_once(1600):
        assert len(list(one.batches(0, 16))) == 16
    assert taken == [4, *[16] * 3, 12]
