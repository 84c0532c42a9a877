"""The largest values alone, with their places."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.distributed.compression.base import chunk_length

SAMPLE = 1 << 16  # values of which the threshold is estimated
ENTRY_BYTES = 8  # an int32 place and a float32 value


class TopK:
    """The `fraction` of the values with the largest magnitudes, exactly k = fraction x count, at least 1; others are 0.

    What is kept is what torch.topk keeps: values above a threshold are found in one pass, a few more than k, and the k
    largest are chosen of these. The threshold is estimated from a sample of 65,536 values, four standard deviations
    below the one wanted; if it was too high all the same, all values are chosen from. Where fewer than k are not 0 the
    rest of the entries are zeros. Magnitudes above float32's largest count as that. Aji & Heafield 2017 (arXiv
    1704.05021), with error feedback Stich et al. 2018 (arXiv 1809.07599).
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
        places, kept = self._split(packed)
        packed.zero_()
        if len(kept):
            chosen = top_k_indices(values, len(kept))
            most = torch.finfo(torch.float32).max
            places[: len(chosen)] = chosen
            kept[: len(chosen)] = values[chosen].clamp(-most, most)

    def decode(self, packed: Tensor, values: Tensor) -> None:
        places, kept = self._split(packed)
        # Entries that stand for nothing add 0 to the first value.
        values.zero_().index_add_(0, places, kept.to(values.dtype))

    def _num_kept(self, count: int) -> int:
        return min(count, max(1, int(self.fraction * count)))

    def _split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        places, kept = packed.chunk(2) if len(packed) else (packed, packed)
        return places.view(torch.int32), kept.view(torch.float32)


def top_k_indices(values: Tensor, k: int) -> Tensor:
    """The places of the k values with the largest magnitudes, or of all that are not 0 if these are fewer."""
    sample = values[:: max(len(values) // SAMPLE, 1) | 1].abs()  # an odd step meets all columns of a matrix
    expected = len(sample) * k / len(values)
    wanted = math.ceil(expected + 4 * math.sqrt(expected)) + 1
    threshold = 0.0 if wanted >= len(sample) else float(sample.topk(wanted, sorted=False).values.min())
    places = _indices_above(values, threshold)
    if len(places) < k and threshold > 0:
        places = _indices_above(values, 0.0)
    if len(places) <= k:
        return places
    return places[values[places].abs().topk(k, sorted=False).indices]


def _indices_above(values: Tensor, threshold: float) -> Tensor:
    """The places of the magnitudes from the threshold on, in order; from above 0, if it is 0."""
    compare = torch.ge if threshold > 0 else torch.gt
    found = torch.zeros(-(-len(values) // 8), 8, dtype=torch.bool, device=values.device)
    piece = chunk_length(values)
    for part, mask in zip(values.split(piece), found.view(-1)[: len(values)].split(piece), strict=True):
        compare(part.abs(), threshold, out=mask)
    # Most rows of 8 have none, and are passed over as one integer of 8 bytes.
    rows = found.view(torch.int64).squeeze(1).nonzero().squeeze(1)
    inside = found[rows].nonzero()
    return rows[inside[:, 0]].mul_(8).add_(inside[:, 1])
