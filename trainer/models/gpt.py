"""A decoder-only transformer of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


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
        if width % heads:
            raise ValueError(f"model.width={width} is not a multiple of model.heads={heads}.")
        self.length, self.checkpointing = length, checkpointing
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
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


class Block(nn.Module):
    """A transformer block: causal self-attention, then a GELU layer of four times the width; both are residual."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
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
            query, key, value, dropout_p=self.drop.p if self.training else 0.0, is_causal=True
        )
        return mixed.transpose(1, 2).reshape(batch, length, width)
