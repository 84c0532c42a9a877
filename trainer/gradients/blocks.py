"""Numbers in blocks of int8 with a scale each, as bytes that may be cut between any two blocks."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
SCALE_BYTES = 4


def pack(values: Tensor) -> Tensor:
    """The bytes [n, b + 4] of blocks [n, b] of floats, b divisible by 4: b numbers as int8, and their float32 scale.

    q = round(x / s) with s = max|x| / 127: each is off by at most max|x| / 254, max|x| being that of its block. A block
    with a number that is not finite has the scale NaN.
    """
    block = values.shape[1]
    packed = torch.empty(len(values), block + SCALE_BYTES, dtype=torch.uint8, device=values.device)
    numbers, scales = _views(packed)
    largest = values.abs().amax(1, keepdim=True)
    # Far below the smallest scale nothing is worth sending, and a block of zeros must not be divided by zero.
    scale = (largest / LARGEST).float().clamp_(min=torch.finfo(torch.float32).tiny)
    scales.copy_(torch.where(scale.isfinite(), scale, torch.nan))
    numbers.copy_(torch.div(values, scale).round_())
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The numbers [n, b] of packed blocks [n, b + 4], in float32."""
    numbers, scales = _views(packed)
    return numbers.to(torch.float32).mul_(scales)  # one operation on int8 and float32 takes five times as long


def _views(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers [n, b] and the scales [n, 1]."""
    return packed[:, :-SCALE_BYTES].view(torch.int8), packed[:, -SCALE_BYTES:].view(torch.float32)
