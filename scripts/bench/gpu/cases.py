"""The models to train, each in the measured size and in a tiny one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data import SequenceWindows, Source, TensorSource
from trainer.models import GPT, MLP
from trainer.models.resnet import ResidualBlock
from trainer.tasks import Classification, LanguageModelling, Task


@dataclass(frozen=True)
class Case:
    """A model with its examples and its optimizer, and the options of its training."""

    model: Callable[[], nn.Module]
    source: Callable[[], Source]
    task: Task
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    batch_size: int
    steps: int
    autocast: torch.dtype | None = None
    compile: Literal["inductor", "aot_eager", None] = None
    channels_last: bool = False


def resnet18(width: int = 64, classes: int = 10) -> nn.Module:
    """Return ResNet-18 (He et al. 2016, arXiv 1512.03385) for images of 32 x 32, without projections.

    The first convolution is 3 x 3 at full size, as is usual for CIFAR; 11.0 million parameters at width 64.
    """
    widths = [width, width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
    blocks = [ResidualBlock(inputs, outputs, "batch") for inputs, outputs in pairwise(widths)]
    first = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


def images(examples: int, *shape: int) -> TensorSource:
    """Return random images of this shape in 10 classes."""
    draw = torch.Generator().manual_seed(0)
    return TensorSource(
        torch.randn(examples, *shape, generator=draw), torch.randint(0, 10, (examples,), generator=draw)
    )


def tokens(windows: int, length: int, vocabulary: int) -> SequenceWindows:
    """Return random windows of tokens."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocabulary, (windows, length + 1), generator=draw, dtype=torch.int32)
    return SequenceWindows(rows, length)


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def cases(tiny: bool) -> dict[str, Case]:
    """Return the cases by name, in the measured size or tiny."""
    sgd = partial(torch.optim.SGD, lr=0.01)
    momentum = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    adamw = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    language = (LanguageModelling(), token_loss, adamw)
    classes = (Classification(), F.cross_entropy)
    if tiny:
        gpt = partial(GPT, 64, 16, layers=2, heads=2, width=32)
        return {
            "gpt": Case(gpt, partial(tokens, 32, 16, 64), *language, 4, 2, torch.bfloat16),
            "resnet": Case(partial(resnet18, 4), partial(images, 32, 3, 32, 32), *classes, momentum, 8, 2, None),
            "mlp": Case(partial(MLP, hidden=16), partial(images, 64, 1, 28, 28), *classes, sgd, 10, 5),
        }
    gpt = partial(GPT, 50304, 1024, layers=12, heads=12, width=768)
    cifar = partial(images, 50_000, 3, 32, 32)
    half = torch.bfloat16
    return {
        "gpt": Case(gpt, partial(tokens, 2048, 1024, 50304), *language, 32, 20, half, "inductor"),
        "resnet": Case(resnet18, cifar, *classes, momentum, 512, 50, half, channels_last=True),
        "mlp": Case(MLP, partial(images, 60_000, 1, 28, 28), *classes, sgd, 10, 500),
    }
