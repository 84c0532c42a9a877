"""The values of the largest magnitude, with their indices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.distributed.compression.base import Codec, chunk_length

SAMPLE = 1 << 16  # values from which the threshold is estimated
ENTRY_BYTES = 8  # an int32 index and a float32 value


class TopK(Codec):
    """The k = fraction x count values of the largest magnitude, at least one; the others become 0.

    The result is that of torch.topk. One pass finds the values above a threshold, a few more than k, and the k largest
    are chosen from these. The threshold is estimated from a sample of 65,536 values, four standard deviations below
    the expected one. If it was too high nevertheless, all values are candidates. If fewer than k values are not 0, the
    other entries are zeros. Magnitudes above the largest float32 count as that.

    Aji & Heafield 2017 (arXiv 1704.05021); with error feedback Stich et al. 2018 (arXiv 1809.07599).

    Args:
        fraction: of the values, above 0 and up to 0.5

    Raises:
        ValueError: the fraction is out of range
    """

    name = "topk"

    def __init__(self, fraction: float = 0.01):
        if not 0 < fraction <= 0.5:
            entry = f"an entry takes {ENTRY_BYTES} bytes, a number 4"
            raise ValueError(f"update_compression.fraction={fraction}\n  valid: above 0, up to 0.5 ({entry})")
        self.fraction = fraction

    def encoded_size(self, count: int) -> int:
        return ENTRY_BYTES * self._num_kept(count)

    def encode(self, values: Tensor, packed: Tensor, seed: int) -> None:
        indices, kept = self._split(packed)
        packed.zero_()
        if len(kept):
            chosen = top_k_indices(values, len(kept))
            largest = torch.finfo(torch.float32).max
            indices[: len(chosen)] = chosen
            kept[: len(chosen)] = values[chosen].clamp(-largest, largest)

    def decode(self, packed: Tensor, values: Tensor) -> None:
        indices, kept = self._split(packed)
        # Unused entries add 0 to the first value.
        values.zero_().index_add_(0, indices, kept.to(values.dtype))

    def _num_kept(self, count: int) -> int:
        return min(count, max(1, int(self.fraction * count)))

    def _split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        indices, kept = packed.chunk(2) if len(packed) else (packed, packed)
        return indices.view(torch.int32), kept.view(torch.float32)


def top_k_indices(values: Tensor, k: int) -> Tensor:
    """Return the indices of the k values of the largest magnitude, or of all that are not 0 if these are fewer."""
    sample = values[:: max(len(values) // SAMPLE, 1) | 1].abs()  # an odd step covers all columns of a matrix
    expected = len(sample) * k / len(values)
    wanted = math.ceil(expected + 4 * math.sqrt(expected)) + 1
    threshold = 0.0 if wanted >= len(sample) else float(sample.topk(wanted, sorted=False).values.min())
    indices = _indices_above(values, threshold)
    if len(indices) < k and threshold > 0:
        indices = _indices_above(values, 0.0)
    if len(indices) <= k:
        return indices
    return indices[values[indices].abs().topk(k, sorted=False).indices]


def _indices_above(values: Tensor, threshold: float) -> Tensor:
    """Return the indices, in order, of the magnitudes >= threshold; of those > 0 if it is 0."""
    compare = torch.ge if threshold > 0 else torch.gt
    found = torch.zeros(-(-len(values) // 8), 8, dtype=torch.bool, device=values.device)
    length = chunk_length(values)
    for part, mask in zip(values.split(length), found.view(-1)[: len(values)].split(length), strict=True):
        compare(part.abs(), threshold, out=mask)
    # Most rows of 8 are empty, and are skipped as one integer of 8 bytes.
    rows = found.view(torch.int64).squeeze(1).nonzero().squeeze(1)
    inside = found[rows].nonzero()
    return rows[inside[:, 0]].mul_(8).add_(inside[:, 1])
