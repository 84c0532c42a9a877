"""How examples come to a GPU that does not wait for them: all of them lie there, or the next ones are on their way.

On the CPU there is no way to go, and nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.data.sources.base import DeviceMovable, Source

MAX_FREE_FRACTION = 0.1  # of a GPU's memory, up to which a training set is held there unless the user says otherwise

PrefetchBlock = tuple[
    tuple[Tensor, ...], list[int]
]  # inputs, targets and what else several batches have, and their sizes


class DeviceFeeder:
    """A source as the device gets it.

    source  gives examples where they lie: on the device, if it was moved there
    prefetch   brings blocks of them, each while the one before is trained on

    `cache_on_gpu` says whether the source is moved; None: if it takes less than a tenth of the device's free memory.
    """

    def __init__(self, source: Source, device: torch.device, cache_on_gpu: bool | None = None):
        self.source, self.prefetch = source, no_prefetch
        if device.type != "cuda":
            return
        if isinstance(source, DeviceMovable) and (_fits(source, device) if cache_on_gpu is None else cache_on_gpu):
            self.source = source.to(device)
        else:
            self.prefetch = Prefetcher(device)


def no_prefetch(blocks: Iterator[PrefetchBlock]) -> Iterator[PrefetchBlock]:
    """The blocks, each made when it is wanted."""
    return blocks


class Prefetcher:
    """Prepares each block on a stream of its own, while the block before is trained on."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def __call__(self, blocks: Iterator[PrefetchBlock]) -> Iterator[PrefetchBlock]:
        """The same blocks, ready for the current stream."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)  # what preprocessing finds on the device has come there
        coming = self._start_next(blocks)
        while coming is not None:
            (columns, sizes), ready = coming
            coming = self._start_next(blocks)
            current.wait_event(ready)
            for column in columns:
                column.record_stream(current)  # its memory is not given away before the steps with it are done
            yield columns, sizes

    def _start_next(self, blocks: Iterator[PrefetchBlock]) -> tuple[PrefetchBlock, torch.Event] | None:
        """The next block, and what tells when it is there; None after the last one."""
        with torch.cuda.stream(self.stream):
            block = next(blocks, None)
            return None if block is None else (block, self.stream.record_event())


def check_cache_on_gpu(source: object, device: torch.device, cache_on_gpu: bool | None) -> None:
    """Raises ValueError when a source shall be held on a GPU and cannot be."""
    if cache_on_gpu and device.type == "cuda" and not isinstance(source, DeviceMovable):
        raise ValueError(
            f"data.cache_on_gpu=true, but a {type(source).__name__} fetches its examples when they are wanted.\n"
            "  valid: auto or false; arrays and texts in memory, without client_shift=, can be held on a GPU"
        )


def _fits(source: DeviceMovable, device: torch.device) -> bool:
    return source.nbytes <= MAX_FREE_FRACTION * torch.cuda.mem_get_info(device)[0]
