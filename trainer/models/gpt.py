"""A decoder-only transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.models.flops import transformer_flops
from trainer.models.layers import TransformerBlock


class GPT(nn.Module):
    """A GPT-2 style transformer (Radford et al. 2019) that predicts the next token.

    Maps tokens [B, T], T at most `length`, to logits [B, T, vocabulary]. Pre-norm blocks, learned positions, and an
    output layer tied to the embedding.

    checkpointing: recompute the activations inside blocks in the backward pass (Chen et al. 2016, arXiv 1604.06174).
        Takes less memory and about a third more time; the gradients are the same.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        length: int = 128,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.length, self.checkpointing = length, checkpointing
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout, is_causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.tokens.weight
        self._init_weights(layers)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.drop(self.tokens(tokens) + self.positions(positions))
        recompute = self.checkpointing and self.training
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if recompute else block(hidden)
        return self.output(self.norm(hidden))

    def flops_per_token(self, length: int) -> float:
        """Return the operations per token of training on sequences of `length` tokens."""
        # The embedding counts: tied to the output, it is a matrix product. Positions are only looked up.
        multiplied = sum(parameter.numel() for parameter in self.parameters()) - self.positions.weight.numel()
        return transformer_flops(multiplied, len(self.blocks), self.tokens.embedding_dim, length)

    @torch.no_grad()
    def generate(self, count: int, generator: torch.Generator, prompt: bytes = b"\n") -> str:
        """Sample `count` bytes and decode them; the vocabulary must be bytes. `generator` is on the CPU."""
        device = self.tokens.weight.device
        tokens = list(prompt)
        for _ in range(count):
            logits = self(torch.tensor([tokens[-self.length :]], device=device))[0, -1]
            tokens.append(int(torch.multinomial(logits.float().softmax(0).cpu(), 1, generator=generator)))
        return bytes(tokens[len(prompt) :]).decode(errors="replace")

    def _init_weights(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                # GPT-2: each block adds to the residual stream twice, so scale down to keep the variance of the sum.
                scale = 0.02 / math.sqrt(2 * layers) if name.endswith("project.weight") else 0.02
                nn.init.normal_(parameter, std=scale)
