"""Prefetching gives the same examples on any device, and at any time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.runs import make_run, parameters
from trainer.data import SequenceWindows, TensorSource
from trainer.data.loading.loader import BatchShard, ClientBatches
from trainer.data.loading.prefetch import DeviceFeeder, PrefetchBlock, Prefetcher, check_cache_on_gpu
from trainer.data.sources.base import DeviceMovable
from trainer.data.sources.torch_datasets import MapDatasetSource
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.utils.hardware import to_device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
laws = settings(deadline=None)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def arrays() -> TensorSource:
    return TensorSource(torch.arange(60.0).view(20, 3), torch.arange(20))


def windows() -> SequenceWindows:
    """Rows that overlap in the storage below them, and begin in its middle."""
    return SequenceWindows(torch.arange(40, dtype=torch.uint8)[3:].unfold(0, 6, 2), 5, np.arange(16))


SOURCES = {"arrays": arrays, "windows": windows}
sources = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())


@sources
def test_a_source_that_is_moved_gives_the_same_examples_with_the_same_labels_and_client_ids(make: Any) -> None:
    source, ids = make(), torch.tensor([7, 0, 15, 7])
    moved = source.to(torch.device("cpu"))
    assert type(moved) is type(source) and len(moved) == len(source)
    for ours, theirs in zip(moved.fetch(ids), source.fetch(ids), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    for ours, theirs in ((moved.labels, source.labels), (moved.client_ids, source.client_ids)):
        assert (ours is None and theirs is None) or np.array_equal(ours, theirs)


def test_rows_that_overlap_take_no_more_memory_when_they_are_moved() -> None:
    """37 of 40 tokens are below 16 rows of 6."""
    source = windows()
    moved = source.to(torch.device("cpu"))
    assert source.nbytes == moved.nbytes == 40
    assert moved.tokens.untyped_storage().data_ptr() != source.tokens.untyped_storage().data_ptr()
    assert moved.tokens.untyped_storage().nbytes() == 40 and moved.tokens.numel() == 96


def test_on_the_cpu_nothing_is_done() -> None:
    source = arrays()
    feeder, blocks = DeviceFeeder(source, CPU, cache_on_gpu=True), iter([])
    assert feeder.source is source and feeder.prefetch(blocks) is blocks
    tensor = torch.ones(3)
    assert to_device(tensor, CPU) is tensor


@laws
@given(st.integers(1, 30), st.integers(1, 8))
def test_what_comes_ahead_of_its_time_is_what_would_have_come(examples: int, batch_size: int) -> None:
    """All blocks are made before the first is used; the batches are those of blocks made one by one."""

    def at_once(blocks: Iterator[PrefetchBlock]) -> Iterator[PrefetchBlock]:
        return iter(list(blocks))

    def batches(**choices: Any) -> list[tuple[Tensor, Tensor]]:
        source = TensorSource(torch.arange(examples).float(), torch.arange(examples))
        stream = ClientBatches(
            lambda wanted: (source.fetch(ids) for ids, _ in wanted),
            np.arange(examples),
            0,
            batch_size,
            BatchShard(),
            0,
            **choices,
        )
        return [pair for batch in stream.batches(0, 2 * stream.steps_per_epoch) for pair in batch.micro_batches]

    for ours, theirs in zip(batches(prefetch=at_once), batches(), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_what_cannot_be_held_on_a_gpu_is_said_before_it_starts() -> None:
    one_by_one = MapDatasetSource([(torch.ones(1), 0)])
    assert isinstance(arrays(), DeviceMovable) and not isinstance(one_by_one, DeviceMovable)
    with pytest.raises(ValueError, match=r"data.cache_on_gpu=true, but a MapDatasetSource .*\n  valid: auto or false"):
        check_cache_on_gpu(one_by_one, GPU, True)
    for source, device, wish in ((one_by_one, CPU, True), (one_by_one, GPU, None), (arrays(), GPU, True)):
        check_cache_on_gpu(source, device, wish)


@needs_cuda
@pytest.mark.parametrize("on_device", [True, False])
def test_a_gpu_trains_on_the_same_examples_however_they_come(on_device: bool) -> None:
    """They have the same bits as examples that are copied before each step."""

    def trained(wish: bool, **choices: Any) -> list[Tensor]:
        with distributed() as topology:
            run = make_run(topology, [300], cache_on_gpu=wish, rounds=2, **choices)
            return parameters(fit(run).model)

    assert all(map(torch.equal, trained(on_device), trained(False, batch_size=8)))


@needs_cuda
def test_blocks_come_on_a_stream_of_their_own() -> None:
    seen: list[torch.cuda.Stream] = []

    def blocks() -> Iterator[PrefetchBlock]:
        for number in range(3):
            seen.append(torch.cuda.current_stream())
            filled = to_device(torch.full((4,), number), GPU)
            yield (filled, filled + 1), [4]

    found = [(int(inputs[0]), int(targets[0])) for (inputs, targets), _ in Prefetcher(GPU)(blocks())]
    assert found == [(0, 1), (1, 2), (2, 3)]
    assert torch.cuda.default_stream() not in seen
