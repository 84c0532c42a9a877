"""Clients whose examples are of other kinds: noisy, turned, wrongly labelled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.data import Clients, DataSplits, PerClientSource, Source, TensorSource
from trainer.data.transforms.base import Examples
from trainer.data.transforms.geometry import image_error, rotate
from trainer.utils.seeding import generator


class ClientShift(Protocol):
    """Abstract: what is done once, before training, to all examples of a client.

    of_test  whether to its test examples too
    """

    of_test: bool

    def __call__(self, examples: Examples, place: float, classes: int | None, draw: torch.Generator) -> Examples:
        """The client's inputs and targets as it has them; `place` is 0 for the first client and 1 for the last."""
        ...


@dataclass(frozen=True)
class Noise:
    """Inputs with Gaussian noise, of a deviation from 0 for the first client to `sigma` for the last.

    Li et al. 2022, Federated learning on non-IID data silos (arXiv 2102.02079), noise-based feature imbalance.
    """

    sigma: float = 0.5
    of_test = True

    def __call__(self, examples: Examples, place: float, classes: int | None, draw: torch.Generator) -> Examples:
        inputs, targets = examples
        if not inputs.is_floating_point():
            raise ValueError("client_shift.noise: inputs that are whole numbers cannot be noisy")
        return inputs + self.sigma * place * torch.randn(inputs.shape, generator=draw, dtype=inputs.dtype), targets


@dataclass(frozen=True)
class Rotation:
    """Images turned: those of the first client not at all, those of the last one by so many degrees."""

    degrees: float = 90.0
    of_test = True

    def __call__(self, examples: Examples, place: float, classes: int | None, draw: torch.Generator) -> Examples:
        inputs, targets = examples
        if fault := image_error(inputs):
            raise ValueError(f"client_shift.rotation: {fault}")
        return rotate(inputs, torch.full((len(inputs),), math.radians(self.degrees) * place)), targets


@dataclass(frozen=True)
class LabelNoise:
    """A part of each client's training labels are those of another class, any of them."""

    fraction: float = 0.2
    of_test = False

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"client_shift.labels.fraction={self.fraction:g}\n  valid: above 0, up to 1")

    def __call__(self, examples: Examples, place: float, classes: int | None, draw: torch.Generator) -> Examples:
        inputs, targets = examples
        if not classes or targets.dim() != 1:
            raise ValueError("client_shift.labels: this data has no labels, one an example")
        is_wrong = torch.rand(len(targets), generator=draw) < self.fraction
        other = torch.randint(1, classes, targets.shape, generator=draw)
        return inputs, torch.where(is_wrong, (targets + other) % classes, targets)


def shift_clients(splits: DataSplits, clients: Clients, skews: Mapping[str, ClientShift], seed: int) -> DataSplits:
    """The data set as these clients have it, in memory, drawn by (seed, name, client, part); or ValueError."""
    if not skews:
        return splits
    if isinstance(splits.train, PerClientSource):
        raise ValueError(
            "client_shift= with data.files=: these clients have examples of their own kind.\n  leave client_shift= out"
        )
    train, test = _fetch_all(splits.train), _fetch_all(splits.test)
    for client in range(len(clients)):
        place = client / max(len(clients) - 1, 1)
        for name, skew in skews.items():
            parts = {"train": (train, np.concatenate((clients.train[client], clients.validation[client])))}
            parts |= {"test": (test, clients.test[client])} if skew.of_test else {}
            for part, ((inputs, targets), ids) in parts.items():
                own = torch.from_numpy(ids)
                draw = generator(seed, "skew", name, client, part)
                inputs[own], targets[own] = skew((inputs[own], targets[own]), place, splits.classes, draw)
    trained, tested = TensorSource(*train, splits.train.client_ids), TensorSource(*test, splits.test.client_ids)
    return DataSplits(trained, tested, splits.classes, splits.client_names, splits.label_names, splits.weights)


def _fetch_all(source: Source) -> tuple[Tensor, Tensor]:
    inputs, targets = source.fetch(torch.arange(len(source)))
    return inputs.clone(), targets.clone()
