"""Vectors as blocks of int8 with a scale each, in bytes that may be cut between any two blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed.compression.blocks import LARGEST, count_blocks, dequantize_blocks, quantize_blocks

LEVELS = 127
SCALE_BYTES = 4


def quantize(values: Tensor, block: int) -> Tensor:
    """The bytes [n, block + 4] of a vector [n block]: each block's numbers as int8, and their float32 scale.

    q = round(x / s) with s = max|x| / 127: each is off by 0.51 s at most, max|x| being that of its block. A block with
    a number that is not finite, or beyond 2^126, has the scale NaN, and so has all that is unpacked of it.
    """
    packed = torch.empty(len(values) // block, block + SCALE_BYTES, dtype=torch.uint8, device=values.device)
    scales, numbers = _views(packed)
    quantize_blocks(values, scales, numbers, block, LEVELS, Tensor.round_)
    scales.masked_fill_(scales > LARGEST / LEVELS / 2, torch.nan)
    return packed


def dequantize(packed: Tensor, values: Tensor) -> Tensor:
    """The vector [count], now with the numbers of the packed blocks [n, block + 4] that it has room for."""
    block = packed.shape[1] - SCALE_BYTES
    scales, numbers = _views(packed[: count_blocks(len(values), block)])
    dequantize_blocks(scales, numbers, values, block, lambda number: number)
    return values


def _views(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The scales [n] and the numbers [n, block]."""
    return packed[:, -SCALE_BYTES:].view(torch.float32).squeeze(1), packed[:, :-SCALE_BYTES].view(torch.int8)
