"""A vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.models.layers import TransformerBlock, order_by_heads


class ViT(nn.Module):
    """The vision transformer of Dosovitskiy et al. 2021 (arXiv 2010.11929).

    Maps images [B, channels, size, size] to logits [B, classes]. Patches of `patch` x `patch` pixels become tokens,
    preceded by a class token from which the logits are computed; pre-norm blocks and learned positions. size=224
    patch=16 width=192 layers=12 heads=3 classes=1000 is DeiT-Ti of Touvron et al. 2021 (arXiv 2012.12877), with
    5,717,416 parameters.
    """

    def __init__(
        self,
        classes: int = 10,
        size: int = 32,
        patch: int = 4,
        width: int = 128,
        layers: int = 6,
        heads: int = 4,
        dropout: float = 0.0,
        channels: int = 3,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(
                f"model.size={size} is not a multiple of model.patch={patch}.\n"
                "  set a patch size that divides the image size"
            )
        self.heads = heads
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout, is_causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self._init_weights()

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embed.expand(images.shape[0], -1, -1), patches], 1)
        hidden = self.drop(tokens + self.positions)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden[:, 0]))

    @property
    def tp_plan(self) -> dict[str, str]:
        """How tensor parallelism cuts the layers, by name."""
        return {f"blocks.*.{name}": style for name, style in TransformerBlock.tp_plan.items()}

    def _init_weights(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        for parameter in (self.class_embed, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)
        order_by_heads(self, self.heads)
