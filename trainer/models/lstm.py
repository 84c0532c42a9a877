"""A recurrent model of text."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LSTM(nn.Module):
    """Tokens [B, T] to the logits of the next token [B, T, vocabulary]: an embedding, LSTM layers, a linear layer.

    By default that of McMahan et al. 2017 (arXiv 1602.05629) for Shakespeare, 8 numbers a token and 2 layers of 256:
    there of 866,578 parameters, here, for the 256 bytes, of 866,560. Every window begins with a state of zeros.
    """

    def __init__(
        self, vocabulary: int = 256, embedding: int = 8, width: int = 256, layers: int = 2, dropout: float = 0.0
    ):
        super().__init__()
        if dropout and layers == 1:
            raise ValueError(f"model.dropout={dropout} with model.layers=1: it is between layers.")
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.layers = nn.LSTM(embedding, width, layers, batch_first=True, dropout=dropout)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.layers(self.tokens(tokens))
        return self.output(hidden)

    @torch.no_grad()
    def generate(self, count: int, generator: torch.Generator, prompt: bytes = b"\n") -> str:
        """Text of `count` sampled bytes; a vocabulary of bytes is understood. `generator` is the CPU's."""
        device, written, state = self.tokens.weight.device, list(prompt), None
        pending = written
        for _ in range(count):
            hidden, state = self.layers(self.tokens(torch.tensor([pending], device=device)), state)
            logits = self.output(hidden[0, -1])
            pending = [int(torch.multinomial(logits.float().softmax(0).cpu(), 1, generator=generator))]
            written = written + pending
        return bytes(written[len(prompt) :]).decode(errors="replace")
