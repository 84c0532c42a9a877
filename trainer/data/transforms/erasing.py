"""Parts of the inputs left out, so that a model does not lean on a few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.transforms.base import Batch, Examples
from trainer.data.transforms.geometry import Geometric


class CutOut(Geometric):
    """A square of zeros in each image, its middle anywhere in it (DeVries and Taylor 2017, arXiv 1708.04552)."""

    def __init__(self, size: int = 16):
        if size < 1:
            raise ValueError(f"size={size}\n  valid: a whole number from 1")
        self.size = size

    def __call__(self, batch: Batch) -> Examples:
        images = batch.inputs
        middles = batch.uniform(2)
        rows, columns = (self._covered(middles[:, axis], images.shape[2 + axis]) for axis in (0, 1))
        return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.0), batch.targets

    def _covered(self, middles: Tensor, side: int) -> Tensor:
        """Which places [B, side] of a side are covered by squares with these middles, in [0, 1)."""
        first = (middles * side).long()[:, None] - self.size // 2
        places = torch.arange(side, device=middles.device)
        return (places >= first) & (places < first + self.size)


class MaskTokens:
    """Each token of the inputs replaced by `token` with this probability; the targets stay (Bowman et al. 2016)."""

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
            return f"inputs of shape {list(inputs.shape)} and type {inputs.dtype} are no tokens [batch, length]"
        if classes and self.token >= classes:
            return f"token={self.token} is none of the {classes} of the vocabulary"
        return ""
