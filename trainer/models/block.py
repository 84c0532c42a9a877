"""The block that transformers are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class TransformerBlock(nn.Module):
    """Self-attention, then a GELU layer of four times the width, both residual: a stream [B, T, width] to another.

    `is_causal`: whether a place attends only to itself and to those before it.
    """

    def __init__(self, width: int, heads: int, dropout: float, is_causal: bool):
        super().__init__()
        if width % heads:
            raise ValueError(f"model.width={width} is not a multiple of model.heads={heads}.")
        self.heads, self.is_causal = heads, is_causal
        self.norm_attention = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.attention_project = nn.Linear(width, width)
        self.norm_hidden = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 4 * width)
        self.hidden_project = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.drop(self.attention_project(self._attend(self.norm_attention(stream))))
        return stream + self.drop(self.hidden_project(F.gelu(self.hidden(self.norm_hidden(stream)))))

    def _attend(self, normed: Tensor) -> Tensor:
        batch, length, width = normed.shape
        projected = self.attention(normed).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.drop.p if self.training else 0.0, is_causal=self.is_causal
        )
        return mixed.transpose(1, 2).reshape(batch, length, width)
