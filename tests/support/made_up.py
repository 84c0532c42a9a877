"""Small random data sets, as targets of data=custom."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data import DataSplits, TensorSource

EXAMPLES, TEST_EXAMPLES = 60, 12


def numbers() -> DataSplits:
    """Return inputs [6], and two numbers that depend on them."""
    inputs = _normal(6)
    return _splits(inputs, inputs[:, :2] - 2 * inputs[:, 4:], None)


def tags() -> DataSplits:
    """Return inputs [6], and three binary labels."""
    inputs = _normal(6)
    return _splits(inputs, (inputs[:, :3] > 0.5).float(), 3)


def images(channels: int, size: int) -> DataSplits:
    """Return images [channels, size, size] of ten classes of different brightness."""
    labels = torch.arange(EXAMPLES + TEST_EXAMPLES) % 10
    return _splits(_normal(channels, size, size) + labels[:, None, None, None] / 5, labels, 10)


def _normal(*shape: int) -> Tensor:
    return torch.randn(EXAMPLES + TEST_EXAMPLES, *shape, generator=torch.Generator().manual_seed(0))


def _splits(inputs: Tensor, targets: Tensor, classes: int | None) -> DataSplits:
    train, test = (TensorSource(inputs[part], targets[part]) for part in (slice(EXAMPLES), slice(EXAMPLES, None)))
    return DataSplits(train, test, classes)
