"""Quantization by blocks: small integers, and a scale for each block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.distributed.compression.base import chunk_length

LARGEST = 2.0**127  # magnitude: its multiples that occur are still finite in float32
SMALLEST = torch.finfo(torch.float32).tiny  # scale: the reciprocal of a smaller one may be infinite


def validate_block_size(key: str, block: int) -> None:
    """Check the size of blocks.

    Args:
        key: the configuration group, for the error
        block: the values of a block

    Raises:
        ValueError: it is not a positive multiple of 8
    """
    if block < 8 or block % 8:
        raise ValueError(f"{key}.block={block}\n  valid: a multiple of 8, from 8")


def count_blocks(count: int, block: int) -> int:
    """Return the number of blocks of `count` values, of which the last may be padded with zeros."""
    return -(-count // block)


def quantize_blocks(
    values: Tensor, scales: Tensor, numbers: Tensor, block: int, levels: int, round: Callable[[Tensor], Tensor]
) -> None:
    """Quantize a vector. Magnitudes above 2^127 count as 2^127, and blocks below 1e-38 levels as zeros.

    Args:
        values: the vector [count]
        scales: output [B], float32: each block's largest magnitude / levels
        numbers: output [B, ...], integers
        block: the values of a block
        levels: the largest integer
        round: from scaled values [b, block], float32 within +-levels, which it may overwrite, to numbers [b, ...]
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
    """Dequantize a vector.

    Args:
        scales: [B], float32
        numbers: [B, ...], integers
        values: output [count]
        block: the values of a block
        integers: from numbers [b, ...] to integers [b, block]
    """
    rows = max(chunk_length(values) // block, 1)
    for part, scale, number in zip(values.split(rows * block), scales.split(rows), numbers.split(rows), strict=True):
        # Integers times floats in one operation take twice as long.
        floats = integers(number).to(torch.float32).mul_(scale.unsqueeze(1))
        part.copy_(floats.view(-1)[: len(part)])
