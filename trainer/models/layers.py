"""Layers shared by several models."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["none", "batch", "group"]


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Return the normalization layer for images of this many channels; groups have 8 channels each."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(channels // 8, 1), channels) if norm == "group" else nn.Identity()


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: self-attention, then an MLP of four times the width with GELU, both residual.

    Maps [B, T, width] to [B, T, width]. With a mask, bool [B, 1, T, T], position i attends to the positions j where it
    is true.

    The rows of `attention_heads` are ordered by heads: the query, the key and the value of the first head, then those
    of the second. So equal stretches of rows are whole heads, which tensor parallelism gives to different ranks.

    is_causal: whether, without a mask, a position attends only to itself and earlier positions.
    """

    # How tensor parallelism cuts the layers of a block, in the words of transformers' plans.
    tp_plan: ClassVar[dict[str, str]] = {
        "attention_heads": "colwise",
        "attention_project": "rowwise",
        "hidden": "colwise",
        "hidden_project": "rowwise",
    }

    def __init__(self, width: int, heads: int, dropout: float, is_causal: bool):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"model.width={width} is not a multiple of model.heads={heads}.\n"
                "  set a width that the number of heads divides"
            )
        self.head_width, self.is_causal = width // heads, is_causal
        self.norm_attention = nn.LayerNorm(width)
        self.attention_heads = nn.Linear(width, 3 * width)
        self.attention_project = nn.Linear(width, width)
        self.norm_hidden = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 4 * width)
        self.hidden_project = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, stream: Tensor, mask: Tensor | None = None) -> Tensor:
        stream = stream + self.drop(self.attention_project(self._attend(self.norm_attention(stream), mask)))
        return stream + self.drop(self.hidden_project(F.gelu(self.hidden(self.norm_hidden(stream)))))

    def _attend(self, normed: Tensor, mask: Tensor | None) -> Tensor:
        # The number of heads is not asked: with tensor parallelism these are the heads of this rank.
        projected = self.attention_heads(normed).unflatten(-1, (-1, 3, self.head_width))
        query, key, value = projected.permute(3, 0, 2, 1, 4)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.drop.p if self.training else 0.0,
            is_causal=self.is_causal and mask is None,
        )
        return mixed.transpose(1, 2).flatten(2)


@torch.no_grad()
def order_by_heads(module: nn.Module, heads: int) -> None:
    """Order the rows of each `attention_heads` by heads, where they were all queries, then all keys, then all values.

    Parameters are drawn in that order: an earlier version had no other, and a seed gives the model that it gave then.
    """
    for name, weight in module.named_parameters():
        if name.endswith("attention_heads.weight"):
            weight.copy_(weight.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2))
