"""A decoder-only transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.models.flops import transformer_flops
from trainer.models.layers import TransformerBlock, order_by_heads
from trainer.models.pruning import dense_sizes


class GPT(nn.Module):
    """A GPT-2 style transformer (Radford et al. 2019) that predicts the next token.

    Maps tokens [B, T], T at most `length`, to logits [B, T, vocabulary]. Pre-norm blocks, learned positions, and an
    output layer tied to the embedding. With `position_ids` [B, T], a 0 begins another text, and texts do not see each
    other.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        length: int = 128,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.length, self.heads = length, heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout, is_causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.tokens.weight
        self._init_weights(layers)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        mask = None if position_ids is None else _same_text(position_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) if position_ids is None else position_ids
        hidden = self.drop(self.tokens(input_ids) + self.positions(positions))
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.output(self.norm(hidden))

    @property
    def tp_plan(self) -> dict[str, str]:
        """How tensor parallelism cuts the layers, by name."""
        ends = {"tokens": "embedding_rowwise", "output": "colwise_gather_output"}
        return ends | {f"blocks.*.{name}": style for name, style in TransformerBlock.tp_plan.items()}

    def flops_per_token(self, length: int) -> float:
        """Return the operations per token of training on sequences of `length` tokens."""
        # The embedding counts: tied to the output, it is a matrix product. Positions are only looked up.
        multiplied = sum(dense_sizes(self).values()) - self.positions.weight.numel()
        return transformer_flops(multiplied, len(self.blocks), self.tokens.embedding_dim, length)

    def _init_weights(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                # GPT-2: each block adds to the residual stream twice, so scale down to keep the variance of the sum.
                scale = 0.02 / math.sqrt(2 * layers) if name.endswith("project.weight") else 0.02
                nn.init.normal_(parameter, std=scale)
        order_by_heads(self, self.heads)


def _same_text(position_ids: Tensor) -> Tensor:
    """Return which earlier positions belong to the text of a position, bool [B, 1, T, T]."""
    texts = (position_ids == 0).cumsum(1)
    return (texts[:, :, None] == texts[:, None, :]).tril()[:, None]
