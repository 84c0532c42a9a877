"""A recurrent language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LSTM(nn.Module):
    """Embedding, LSTM layers, and a linear layer: tokens [B, T] to logits of the next token [B, T, vocabulary].

    The default is the model of McMahan et al. 2017 (arXiv 1602.05629) for Shakespeare, an embedding of 8 and 2 layers
    of 256. It has 866,560 parameters for 256 bytes; the paper has 866,578. The state of every window starts at zero.
    """

    def __init__(
        self, vocabulary: int = 256, embedding: int = 8, width: int = 256, layers: int = 2, dropout: float = 0.0
    ):
        super().__init__()
        if dropout and layers == 1:
            raise ValueError(
                f"model.dropout={dropout} with model.layers=1: dropout is between layers.\n"
                "  set model.dropout=0, or model.layers=2"
            )
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.layers = nn.LSTM(embedding, width, layers, batch_first=True, dropout=dropout)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.layers(self.tokens(tokens))
        return self.output(hidden)

    @torch.no_grad()
    def generate(self, count: int, generator: torch.Generator, prompt: bytes = b"\n") -> str:
        """Sample `count` bytes and decode them; the vocabulary must be bytes. `generator` is on the CPU."""
        device, state = self.tokens.weight.device, None
        sampled: list[int] = []
        tokens = list(prompt)
        for _ in range(count):
            hidden, state = self.layers(self.tokens(torch.tensor([tokens], device=device)), state)
            logits = self.output(hidden[0, -1])
            tokens = [int(torch.multinomial(logits.float().softmax(0).cpu(), 1, generator=generator))]
            sampled += tokens
        return bytes(sampled).decode(errors="replace")
