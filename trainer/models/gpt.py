"""A decoder-only transformer of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.models.block import TransformerBlock
from trainer.models.flops import transformer_flops


class GPT(nn.Module):
    """Tokens [B, T], T at most `length`, to the logits of the next token [B, T, vocabulary].

    Pre-norm blocks with learned positions and the output tied to the embedding, as in GPT-2 (Radford et al. 2019).
    With `checkpointing` only what goes from block to block is kept for the backward pass, which computes the rest
    again: the same numbers in less memory, at the price of a third of the time (Chen et al. 2016, arXiv 1604.06174).
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
        self._initialise(layers)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.drop(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            again = self.checkpointing and self.training
            hidden = checkpoint(block, hidden, use_reentrant=False) if again else block(hidden)
        return self.output(self.norm(hidden))

    def flops_per_token(self, length: int) -> float:
        """Those of training on `length` tokens. The embedding counts, being the output; positions do not."""
        multiplied = sum(parameter.numel() for parameter in self.parameters()) - self.positions.weight.numel()
        return transformer_flops(multiplied, len(self.blocks), self.tokens.embedding_dim, length)

    @torch.no_grad()
    def generate(self, count: int, generator: torch.Generator, prompt: bytes = b"\n") -> str:
        """Text of `count` sampled bytes; a vocabulary of bytes is understood. `generator` is the CPU's."""
        device = self.tokens.weight.device
        written = list(prompt)
        for _ in range(count):
            logits = self(torch.tensor([written[-self.length :]], device=device))[0, -1]
            written.append(int(torch.multinomial(logits.float().softmax(0).cpu(), 1, generator=generator)))
        return bytes(written[len(prompt) :]).decode(errors="replace")

    def _initialise(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                # Each block adds to the stream twice; its outputs are scaled down to keep the sum's variance.
                scale = 0.02 / math.sqrt(2 * layers) if name.endswith("project.weight") else 0.02
                nn.init.normal_(parameter, std=scale)
