"""Logistic regression, the convex model."""

from __future__ import annotations

from torch import Tensor, nn


class Logistic(nn.Module):
    """One linear layer from flattened inputs [B, ...] with `inputs` values each to logits [B, classes].

    The cross-entropy is convex in its parameters, so a distance from the optimum is due to the algorithm alone.
    """

    def __init__(self, inputs: int = 784, classes: int = 10):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)
