"""Values in blocks, each divided by a scale of its own, so that small integers can stand for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.distributed.compression.base import chunk_length

LARGEST = 2.0**127  # of which the multiples that occur are still float32
SMALLEST = torch.finfo(torch.float32).tiny


def validate_block_size(key: str, block: int) -> None:
    """Raises ValueError for a size of blocks that bytes and scales do not fill; `key` is where it was said."""
    if block < 8 or block % 8:
        raise ValueError(f"{key}.block={block}\n  valid: a multiple of 8, from 8")


def count_blocks(count: int, block: int) -> int:
    """The blocks of so many values; the last one may be filled up with zeros."""
    return -(-count // block)


def quantize_blocks(
    values: Tensor, scales: Tensor, numbers: Tensor, block: int, levels: int, round: Callable[[Tensor], Tensor]
) -> None:
    """Writes a scale for each block, its largest magnitude / `levels`, and what `round` makes of the blocks over them.

    values [count], scales [B] float32, numbers [B, ...]; `round` takes [b, block] float32 within +-levels, which it may
    write over. Magnitudes above 2^127 count as that, blocks below 1e-38 levels as zeros.
    """
    rows = max(chunk_length(values) // block, 1)
    scratch = torch.empty(min(rows, len(scales)), block, dtype=torch.float32, device=values.device)
    for part, scale, number in zip(values.split(rows * block), scales.split(rows), numbers.split(rows), strict=True):
        blocks = scratch[: len(scale)]
        flat = blocks.view(-1)
        flat[: len(part)].copy_(part).clamp_(-LARGEST, LARGEST)
        flat[len(part) :] = 0
        torch.maximum(blocks.amax(1), -blocks.amin(1), out=scale)
        inverse = scale.div_(levels).reciprocal()
        inverse.masked_fill_(scale < SMALLEST, 0)
        number.copy_(round(blocks.mul_(inverse.unsqueeze(1))))


def dequantize_blocks(
    scales: Tensor, numbers: Tensor, values: Tensor, block: int, integers: Callable[[Tensor], Tensor]
) -> None:
    """Writes integers [b, block] times their scales into the values; `integers` makes them of the numbers [b, ...]."""
    rows = max(chunk_length(values) // block, 1)
    for part, scale, number in zip(values.split(rows * block), scales.split(rows), numbers.split(rows), strict=True):
        # Integers times floats, in one operation, take twice as long.
        floats = integers(number).to(torch.float32).mul_(scale.unsqueeze(1))
        part.copy_(floats.view(-1)[: len(part)])
