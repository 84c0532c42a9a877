"""Logistic regression, the convex model."""

from __future__ import annotations

from torch import Tensor, nn


class Logistic(nn.Module):
    """One linear layer: inputs [B, ...] of `inputs` values to logits [B, classes].

    Under cross-entropy its loss is convex: what keeps an algorithm from the optimum is the algorithm.
    """

    def __init__(self, inputs: int = 784, classes: int = 10):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)
