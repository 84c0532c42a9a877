"""Numbers in 4 bits with stochastic rounding, and a scale for each block."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trainer.distributed.compression.base import Codec
from trainer.distributed.compression.blocks import count_blocks, dequantize_blocks, quantize_blocks, validate_block_size
from trainer.utils.seeding import generator

LEVELS = 7
DRAWS = 1 << 16  # different random numbers that are drawn


class Int4(Codec):
    """Each value rounded at random to one of the two nearest multiples of its block's scale, largest magnitude / 7.

    The rounding is unbiased: the mean over seeds is the value, to 2^-16 scale. |error| <= scale within a block, for
    magnitudes from 9e-38 to 2^127. As in QSGD, Alistarh et al. 2017 (arXiv 1610.02132), with the largest magnitude in
    place of the norm. With blocks of 256 the float32 scales add 1/32 to the size.

    A byte holds number i of a block and number i + block / 2, as the first plus 16 times the second.

    Args:
        block: the values that share a scale, a multiple of 8

    Raises:
        ValueError: the block is not a multiple of 8
    """

    name = "int4"

    def __init__(self, block: int = 256):
        validate_block_size("update_compression", block)
        self.block = block

    def encoded_size(self, count: int) -> int:
        return count_blocks(count, self.block) * (4 + self.block // 2)

    def encode(self, values: Tensor, packed: Tensor, seed: int) -> None:
        scales, pairs = self._split(packed, len(values))
        draw = generator(seed, device=values.device)
        quantize_blocks(values, scales, pairs, self.block, LEVELS, partial(_pack_nibbles, draw))

    def decode(self, packed: Tensor, values: Tensor) -> None:
        scales, pairs = self._split(packed, len(values))
        dequantize_blocks(scales, pairs, values, self.block, _unpack_nibbles)

    def _split(self, packed: Tensor, count: int) -> tuple[Tensor, Tensor]:
        blocks = count_blocks(count, self.block)
        scales, pairs = packed.split([4 * blocks, self.block // 2 * blocks])
        return scales.view(torch.float32), pairs.view(torch.int8).view(blocks, self.block // 2)


def _pack_nibbles(draw: torch.Generator, blocks: Tensor) -> Tensor:
    """Round blocks [b, block] up or down at random, and combine two numbers each: [b, block / 2]."""
    # Each 64 random bits are four integers r in [-2^15, 2^15): floor(x + u) with u = (r + 1/2) / 2^16 + 1/2 in (0, 1).
    bits = torch.empty(blocks.numel() // 4, dtype=torch.int64, device=blocks.device)
    bits.random_(-(2**63), None, generator=draw)
    blocks.add_(bits.view(torch.int16).view_as(blocks), alpha=1 / DRAWS).add_(0.5 + 0.5 / DRAWS).floor_()
    first, second = blocks.chunk(2, 1)
    return first.add(second, alpha=16)


def _unpack_nibbles(pairs: Tensor) -> Tensor:
    """Return the numbers [b, block], within +-7, of pairs [b, block / 2]."""
    second = pairs.add(8).bitwise_right_shift_(4)
    return torch.cat([pairs.sub(second, alpha=16), second], 1)
