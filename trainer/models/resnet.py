"""Residual networks for small images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.layers import make_norm


class ResNet(nn.Module):
    """The residual network for CIFAR of He et al. 2016 (arXiv 1512.03385).

    Maps images [B, channels, H, W] to logits [B, classes]. A 3 x 3 convolution, three stages of (depth - 2) / 6 blocks,
    global average pooling, and a linear layer. The stages have `width`, 2 `width` and 4 `width` channels; each but the
    first halves the image. Shortcuts have no parameters: they subsample pixels and pad channels with zeros. At width 16
    and 10 classes, depth 20 has 269,722 parameters and depth 110 has 1,727,962.

    norm: `batch` as in the paper, or GroupNorm with groups of 8 channels, which has no batch statistics: Wu and He 2018
        (arXiv 1803.08494).
    """

    def __init__(
        self,
        classes: int = 10,
        depth: int = 20,
        width: int = 16,
        norm: Literal["group", "batch"] = "group",
        channels: int = 3,
    ):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"model.depth={depth}\n  valid: 6 n + 2, such as 8, 14, 20, 32, 44, 56, 110")
        self.first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = make_norm(norm, width)
        blocks = (depth - 2) // 6
        self.stage1 = _stage(blocks, width, width, norm)
        self.stage2 = _stage(blocks, width, 2 * width, norm)
        self.stage3 = _stage(blocks, 2 * width, 4 * width, norm)
        self.head = nn.Linear(4 * width, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.first(images)).relu()
        features = self.stage3(self.stage2(self.stage1(features)))
        return self.head(features.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut. A block that adds channels halves the image."""

    def __init__(self, inputs: int, outputs: int, norm: Literal["group", "batch"]):
        super().__init__()
        self.stride, self.added_channels = (1, 0) if inputs == outputs else (2, outputs - inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = make_norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, outputs)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(features)).relu()
        return torch.relu(self.norm2(self.conv2(hidden)) + self._shortcut(features))

    def _shortcut(self, features: Tensor) -> Tensor:
        if not self.added_channels:
            return features
        before = self.added_channels // 2
        subsampled = features[:, :, :: self.stride, :: self.stride]
        return F.pad(subsampled, (0, 0, 0, 0, before, self.added_channels - before))


def _stage(blocks: int, inputs: int, outputs: int, norm: Literal["group", "batch"]) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(inputs if i == 0 else outputs, outputs, norm) for i in range(blocks)))
