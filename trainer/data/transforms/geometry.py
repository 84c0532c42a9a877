"""Images moved, mirrored and turned, each in its own way."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.transforms.base import Batch, Examples


def image_error(inputs: Tensor) -> str:
    """Why these are no images [B, C, H, W]; empty when they are."""
    if inputs.dim() != 4 or not inputs.is_floating_point():
        given = f"{list(inputs.shape)} and type {inputs.dtype}"
        return f"inputs of shape {given} are no images [batch, channels, height, width]"
    return ""


def rotate(images: Tensor, angles: Tensor) -> Tensor:
    """Images [B, C, H, W] turned about their middles by these angles [B], in radians, with zeros outside of them."""
    cosine, sine, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # Of images that are not square a turn is one of places, not of fractions of the sides.
    high, wide = images.shape[2:]
    turns = torch.stack((cosine, -sine * high / wide, zero, sine * wide / high, cosine, zero), 1).view(-1, 2, 3)
    grid = F.affine_grid(turns.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Geometric:
    """What is done to images alone, at random."""

    is_random = True

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        return image_error(inputs)


class RandomCrop(Geometric):
    """Each image, with zeros on all sides, cut at random to its own size again (He et al. 2016, section 4.2)."""

    def __init__(self, padding: int = 4):
        if padding < 1:
            raise ValueError(f"padding={padding}\n  valid: a whole number from 1")
        self.padding = padding

    def __call__(self, batch: Batch) -> Examples:
        images, pad = batch.inputs, self.padding
        rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
        moved = batch.integers(2 * pad + 1, 2)
        padded = F.pad(images, (pad, pad, pad, pad))
        where = torch.arange(len(images), device=images.device)[:, None, None]
        cut = padded[where, :, (moved[:, :1] + rows)[:, :, None], (moved[:, 1:] + columns)[:, None, :]]
        return cut.permute(0, 3, 1, 2).contiguous(), batch.targets


class RandomFlip(Geometric):
    """Each image mirrored, left to right, with this probability."""

    def __init__(self, probability: float = 0.5):
        if not 0 < probability <= 1:
            raise ValueError(f"probability={probability:g}\n  valid: above 0, up to 1")
        self.probability = probability

    def __call__(self, batch: Batch) -> Examples:
        is_flipped = (batch.uniform() < self.probability)[:, :, None, None]
        return torch.where(is_flipped, batch.inputs.flip(3), batch.inputs), batch.targets


class RandomRotation(Geometric):
    """Each image turned about its middle by up to so many degrees to either side, with zeros outside of it."""

    def __init__(self, degrees: float = 10.0):
        if not 0 < degrees <= 180:
            raise ValueError(f"degrees={degrees:g}\n  valid: above 0, up to 180")
        self.degrees = degrees

    def __call__(self, batch: Batch) -> Examples:
        angles = (2 * batch.uniform()[:, 0] - 1) * math.radians(self.degrees)
        return rotate(batch.inputs, angles), batch.targets
