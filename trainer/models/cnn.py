"""Small convolutional networks for grayscale images."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.models.layers import Norm, make_norm


class CNN(nn.Module):
    """The CNN of McMahan et al. 2017 (arXiv 1602.05629), with 1,663,370 parameters.

    Maps images [B, 1, 28, 28] to logits [B, classes]. Two 5 x 5 convolutions with 32 and 64 channels and same padding,
    each followed by ReLU and 2 x 2 max-pooling, then a hidden layer of 512.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
            nn.Linear(512, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class DigitsCNN(nn.Module):
    """A small CNN for scikit-learn's digits, with 43,050 parameters by default.

    Maps images [B, 1, 8, 8] to logits [B, classes].

    norm: the normalization after each convolution; `group` has groups of 8 channels.
    """

    def __init__(self, classes: int = 10, channels: int = 32, hidden: int = 64, norm: Norm = "none"):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.norm1 = make_norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = make_norm(norm, channels)
        self.head = nn.Sequential(
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(channels * 16, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm1(self.conv1(images)).relu()
        return self.head(self.norm2(self.conv2(features)).relu())
