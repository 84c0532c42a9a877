"""The fully connected network of McMahan et al. 2017, their 2NN."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """Two hidden ReLU layers from flattened images [B, ...] with `inputs` values each to logits [B, classes].

    The default, 784-200-200-10, has the 199,210 parameters of McMahan et al. 2017 (arXiv 1602.05629).
    """

    def __init__(self, inputs: int = 784, hidden: int = 200, classes: int = 10):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
