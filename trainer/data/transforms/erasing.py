"""Transforms that erase parts of the inputs at random."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.transforms.base import Batch, Examples
from trainer.data.transforms.geometry import Geometric


class CutOut(Geometric):
    """Zero a square with a random center in each image (DeVries and Taylor 2017, arXiv 1708.04552)."""

    def __init__(self, size: int = 16):
        if size < 1:
            raise ValueError(f"size={size}\n  valid: a whole number from 1")
        self.size = size

    def __call__(self, batch: Batch) -> Examples:
        images = batch.inputs
        centers = batch.uniform(2)
        rows, columns = (self._covered(centers[:, axis], images.shape[2 + axis]) for axis in (0, 1))
        return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.0), batch.targets

    def _covered(self, centers: Tensor, side: int) -> Tensor:
        """Return bool [B, side], the pixels of a side that squares with these centers in [0, 1) cover."""
        first = (centers * side).long()[:, None] - self.size // 2
        pixels = torch.arange(side, device=centers.device)
        return (pixels >= first) & (pixels < first + self.size)


class MaskTokens:
    """Replace input tokens by `token` with this probability; keep the targets (Bowman et al. 2016)."""

    is_random = True

    def __init__(self, probability: float = 0.1, token: int = 0):
        if not 0 < probability < 1 or token < 0:
            raise ValueError(f"probability={probability:g} token={token}\n  valid: above 0, below 1; a token from 0")
        self.probability, self.token = probability, token

    def __call__(self, batch: Batch) -> Examples:
        is_masked = batch.uniform(batch.inputs.shape[1]) < self.probability
        return batch.inputs.masked_fill(is_masked, self.token), batch.targets

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if inputs.dim() != 2 or inputs.is_floating_point():
            return f"inputs of shape {list(inputs.shape)} and dtype {inputs.dtype} are not tokens [batch, length]"
        if classes and self.token >= classes:
            return f"token={self.token} is outside the vocabulary, 0..{classes - 1}"
        return ""
