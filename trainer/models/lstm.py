"""A recurrent language model."""

from __future__ import annotations

from torch import Tensor, nn


class LSTM(nn.Module):
    """Embedding, LSTM layers, and a linear layer: tokens [B, T] to logits of the next token [B, T, vocabulary].

    The default is the model of McMahan et al. 2017 (arXiv 1602.05629) for Shakespeare, an embedding of 8 and 2 layers
    of 256. It has 866,560 parameters for 256 bytes; the paper has 866,578. The state of every window starts at zero.
    """

    dynamic_dimensions = (0,)  # an exported graph has a step of the recurrence for each token

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

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden, _ = self.layers(self.tokens(input_ids))
        return self.output(hidden)
