"""Numbers in 16 bits instead of 32."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from trainer.distributed.compression.base import Codec, chunk_length, multiple_of_4

HalfDtype = Literal["bfloat16", "float16"]


class Cast(Codec):
    """Each value rounded to the nearest number of 16 bits; larger ones become the largest finite number.

    bfloat16  8 bits of exponent, 8 of precision: |error| <= 2^-8 |x|, or 1e-38 if that is more; up to 3.3e38
    float16   5 bits of exponent, 11 of precision: |error| <= 2^-11 |x|, or 3e-8 if that is more; up to 65504

    Args:
        dtype: bfloat16 or float16

    Raises:
        ValueError: it is another dtype
    """

    def __init__(self, dtype: HalfDtype):
        if dtype not in get_args(HalfDtype):
            raise ValueError(f"update_compression.dtype={dtype}\n  valid: {', '.join(get_args(HalfDtype))}")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def encoded_size(self, count: int) -> int:
        return multiple_of_4(2 * count)

    def encode(self, values: Tensor, packed: Tensor, seed: int) -> None:
        largest, length = torch.finfo(self.dtype).max, chunk_length(values)
        scratch = values.new_empty(min(length, len(values)), dtype=torch.float32)
        for part, numbers in zip(values.split(length), self._numbers(packed, values).split(length), strict=True):
            numbers.copy_(scratch[: len(part)].copy_(part).clamp_(-largest, largest))
        packed[2 * len(values) :].zero_()

    def decode(self, packed: Tensor, values: Tensor) -> None:
        values.copy_(self._numbers(packed, values))

    def _numbers(self, packed: Tensor, values: Tensor) -> Tensor:
        return packed[: 2 * len(values)].view(self.dtype)
