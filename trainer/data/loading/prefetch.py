"""Bring examples to a GPU before they are needed: hold all of them there, or copy the next ones in advance.

On the CPU nothing is prefetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from trainer.data.sources.base import DeviceMovable, Source
from trainer.utils.tensor_trees import Tree, tensors

CacheOnGpu = bool | Literal["auto"]

MAX_FREE_FRACTION = 0.1  # of a GPU's free memory that a training set may take by default

# Inputs, targets and perhaps weights of several batches, and the sizes of the batches.
PrefetchBlock = tuple[tuple[Tree, ...], list[int]]


class DeviceFeeder:
    """Decides how a source's examples reach the device.

    Args:
        source: the source of examples.
        device: the device that trains.
        cache_on_gpu: whether to move the source to the device; auto: if it takes less than a tenth of the device's
            free memory.

    Attributes:
        source: the source to fetch from, on the device if it was moved.
        prefetch: passes on blocks of batches, each prepared while the one before is trained on.
    """

    def __init__(self, source: Source, device: torch.device, cache_on_gpu: CacheOnGpu = "auto"):
        self.source, self.prefetch = source, no_prefetch
        if device.type != "cuda":
            return
        if isinstance(source, DeviceMovable) and (_fits(source, device) if cache_on_gpu == "auto" else cache_on_gpu):
            self.source = source.to(device)
        else:
            self.prefetch = Prefetcher(device)


def no_prefetch(blocks: Iterator[PrefetchBlock]) -> Iterator[PrefetchBlock]:
    """Return the blocks unchanged: each is made when it is needed."""
    return blocks


class Prefetcher:
    """Prepares each block on a side stream while the block before is trained on."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def __call__(self, blocks: Iterator[PrefetchBlock]) -> Iterator[PrefetchBlock]:
        """Yield the same blocks, ready for the current stream."""
        current = torch.cuda.current_stream(self.stream.device)
        # The side stream reads tensors that the current stream may still be writing, such as a cached source.
        self.stream.wait_stream(current)
        pending = self._start_next(blocks)
        while pending is not None:
            (columns, sizes), ready = pending
            pending = self._start_next(blocks)
            current.wait_event(ready)
            for tensor in tensors(columns):
                # The memory belongs to the side stream. Do not reuse it before the steps on it have run.
                tensor.record_stream(current)
            yield columns, sizes

    def _start_next(self, blocks: Iterator[PrefetchBlock]) -> tuple[PrefetchBlock, torch.Event] | None:
        """Return the next block with the event of its completion; None after the last block."""
        with torch.cuda.stream(self.stream):
            block = next(blocks, None)
            return None if block is None else (block, self.stream.record_event())


def check_cache_on_gpu(source: object, device: torch.device, cache_on_gpu: CacheOnGpu) -> None:
    """Raise ValueError if the source is to be held on a GPU and cannot be."""
    if cache_on_gpu is True and device.type == "cuda" and not isinstance(source, DeviceMovable):
        raise ValueError(
            f"data.cache_on_gpu=true, but a {type(source).__name__} reads its examples when they are needed.\n"
            "  valid: auto or false; arrays and texts in memory, without client_shift=, can be held on a GPU"
        )


def _fits(source: DeviceMovable, device: torch.device) -> bool:
    return source.nbytes <= MAX_FREE_FRACTION * torch.cuda.mem_get_info(device)[0]
