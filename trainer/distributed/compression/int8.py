"""Numbers of 8 bits, and a scale a block."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed.compression.blocks import count_blocks, dequantize_blocks, quantize_blocks, validate_block_size

LEVELS = 127


class Int8:
    """Each value as the nearest multiple of its block's scale, the largest magnitude of the block / 127.

    |error| <= 0.51 scale within a block, for magnitudes from 2e-36 to 2^127. Scales are float32: with blocks of 256
    they add a 64th. Dettmers et al. 2022 (arXiv 2110.02861) quantise by blocks so.
    """

    name = "int8"

    def __init__(self, block: int = 256):
        validate_block_size("update_compression", block)
        self.block = block

    def encoded_size(self, count: int) -> int:
        return count_blocks(count, self.block) * (4 + self.block)

    def encode(self, values: Tensor, packed: Tensor, seed: int) -> None:
        scales, numbers = self._split(packed, len(values))
        quantize_blocks(values, scales, numbers, self.block, LEVELS, Tensor.round_)

    def decode(self, packed: Tensor, values: Tensor) -> None:
        scales, numbers = self._split(packed, len(values))
        dequantize_blocks(scales, numbers, values, self.block, lambda number: number)

    def _split(self, packed: Tensor, count: int) -> tuple[Tensor, Tensor]:
        blocks = count_blocks(count, self.block)
        scales, numbers = packed.split([4 * blocks, self.block * blocks])
        return scales.view(torch.float32), numbers.view(torch.int8).view(blocks, self.block)
