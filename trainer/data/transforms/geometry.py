"""Geometric transforms of images, drawn for each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.transforms.base import Batch, Examples


def image_error(inputs: Tensor) -> str:
    """Return why these are not images [B, C, H, W]; empty if they are."""
    if inputs.dim() != 4 or not inputs.is_floating_point():
        given = f"{list(inputs.shape)} and dtype {inputs.dtype}"
        return f"inputs of shape {given} are not images [batch, channels, height, width]"
    return ""


def rotate(images: Tensor, angles: Tensor) -> Tensor:
    """Rotate images [B, C, H, W] about their centers by angles [B] in radians, with zeros outside of the image."""
    cosine, sine, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    height, width = images.shape[2:]
    # affine_grid has coordinates in fractions of the sides. The ratio keeps angles of images that are not square.
    matrix = (cosine, -sine * height / width, zero, sine * width / height, cosine, zero)
    grid = F.affine_grid(torch.stack(matrix, 1).view(-1, 2, 3).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Geometric:
    """Base of random transforms of images."""

    is_random = True

    def mismatch(self, inputs: Tensor, targets: Tensor, classes: int | None) -> str:
        return image_error(inputs)


class RandomCrop(Geometric):
    """Pad each image with zeros and crop it at random to its former size (He et al. 2016, section 4.2)."""

    def __init__(self, padding: int = 4):
        if padding < 1:
            raise ValueError(f"padding={padding}\n  valid: a whole number from 1")
        self.padding = padding

    def __call__(self, batch: Batch) -> Examples:
        images, pad = batch.inputs, self.padding
        rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
        offsets = batch.integers(2 * pad + 1, 2)
        padded = F.pad(images, (pad, pad, pad, pad))
        index = torch.arange(len(images), device=images.device)[:, None, None]
        crops = padded[index, :, (offsets[:, :1] + rows)[:, :, None], (offsets[:, 1:] + columns)[:, None, :]]
        return crops.permute(0, 3, 1, 2).contiguous(), batch.targets


class RandomFlip(Geometric):
    """Flip each image horizontally with this probability."""

    def __init__(self, probability: float = 0.5):
        if not 0 < probability <= 1:
            raise ValueError(f"probability={probability:g}\n  valid: above 0, up to 1")
        self.probability = probability

    def __call__(self, batch: Batch) -> Examples:
        is_flipped = (batch.uniform() < self.probability)[:, :, None, None]
        return torch.where(is_flipped, batch.inputs.flip(3), batch.inputs), batch.targets


class RandomRotation(Geometric):
    """Rotate each image about its center by up to `degrees` in either direction, with zeros outside of it."""

    def __init__(self, degrees: float = 10.0):
        if not 0 < degrees <= 180:
            raise ValueError(f"degrees={degrees:g}\n  valid: above 0, up to 180")
        self.degrees = degrees

    def __call__(self, batch: Batch) -> Examples:
        angles = (2 * batch.uniform()[:, 0] - 1) * math.radians(self.degrees)
        return rotate(batch.inputs, angles), batch.targets
