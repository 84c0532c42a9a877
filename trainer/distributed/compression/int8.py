"""Numbers as int8 with a float32 scale for each block, in two layouts.

`Int8` has all scales before all numbers. `quantize` has each block's numbers and then its scale, so that a collective
may cut the bytes between any two blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed.compression.base import Codec
from trainer.distributed.compression.blocks import (
    LARGEST,
    count_blocks,
    dequantize_blocks,
    quantize_blocks,
    validate_block_size,
)

LEVELS = 127
SCALE_BYTES = 4


class Int8(Codec):
    """Each value as the nearest multiple of its block's scale, the largest magnitude of the block / 127.

    |error| <= 0.51 scale within a block, for magnitudes from 2e-36 to 2^127. With blocks of 256 the scales add 1/64 to
    the size. Dettmers et al. 2022 (arXiv 2110.02861) quantize by blocks in this way.

    Args:
        block: the values that share a scale, a multiple of 8

    Raises:
        ValueError: the block is not a multiple of 8
    """

    name = "int8"

    def __init__(self, block: int = 256):
        validate_block_size("update_compression", block)
        self.block = block

    def encoded_size(self, count: int) -> int:
        return count_blocks(count, self.block) * (SCALE_BYTES + self.block)

    def encode(self, values: Tensor, packed: Tensor, seed: int) -> None:
        scales, numbers = self._split(packed, len(values))
        quantize_blocks(values, scales, numbers, self.block, LEVELS, Tensor.round_)

    def decode(self, packed: Tensor, values: Tensor) -> None:
        scales, numbers = self._split(packed, len(values))
        dequantize_blocks(scales, numbers, values, self.block, lambda number: number)

    def _split(self, packed: Tensor, count: int) -> tuple[Tensor, Tensor]:
        blocks = count_blocks(count, self.block)
        scales, numbers = packed.split([SCALE_BYTES * blocks, self.block * blocks])
        return scales.view(torch.float32), numbers.view(torch.int8).view(blocks, self.block)


def quantize(values: Tensor, block: int) -> Tensor:
    """Quantize a vector to blocks that may be separated.

    q = round(x / s) with s = max|x| / 127, so that each value is off by at most 0.51 s. A block with a value that is
    not finite, or is above 2^126, gets the scale NaN, and all its values are NaN when they are dequantized.

    Args:
        values: the vector [n block]
        block: the values that share a scale, a multiple of 8

    Returns:
        bytes [n, block + 4]: the numbers of each block, and its scale
    """
    packed = torch.empty(len(values) // block, block + SCALE_BYTES, dtype=torch.uint8, device=values.device)
    scales, numbers = _views(packed)
    quantize_blocks(values, scales, numbers, block, LEVELS, Tensor.round_)
    scales.masked_fill_(scales > LARGEST / LEVELS / 2, torch.nan)
    return packed


def dequantize(packed: Tensor, values: Tensor) -> Tensor:
    """Dequantize blocks [n, block + 4] into the values [count], which are returned; the rest of them is padding."""
    block = packed.shape[1] - SCALE_BYTES
    scales, numbers = _views(packed[: count_blocks(len(values), block)])
    dequantize_blocks(scales, numbers, values, block, lambda number: number)
    return values


def _views(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the scales [n] and the numbers [n, block]."""
    return packed[:, -SCALE_BYTES:].view(torch.float32).squeeze(1), packed[:, :-SCALE_BYTES].view(torch.int8)
