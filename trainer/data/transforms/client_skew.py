"""Shifts of clients' data: noise, rotation and label noise that differ between clients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.data.partition.clients import Clients
from trainer.data.sources.base import DataSplits, Source, TensorSource
from trainer.data.transforms.base import Examples
from trainer.data.transforms.geometry import image_error, rotate
from trainer.utils.seeding import generator
from trainer.utils.tensor_trees import describe, map_tensors


class ClientShift(Protocol):
    """Abstract: shifts all examples of a client once, before training.

    Attributes:
        of_test: whether test examples are shifted too.
    """

    of_test: bool

    def __call__(self, examples: Examples, level: float, classes: int | None, generator: torch.Generator) -> Examples:
        """Return the client's new inputs and targets; `level` is 0 for the first client and 1 for the last."""
        ...


@dataclass(frozen=True)
class Noise:
    """Add Gaussian noise with a standard deviation from 0 for the first client to `sigma` for the last.

    Li et al. 2022, Federated learning on non-IID data silos (arXiv 2102.02079), noise-based feature imbalance.
    """

    sigma: float = 0.5
    of_test = True

    def __call__(self, examples: Examples, level: float, classes: int | None, generator: torch.Generator) -> Examples:
        inputs, targets = examples
        if not inputs.is_floating_point():
            raise ValueError("client_shift.noise: inputs are integers, and noise needs floating-point inputs")
        noise = torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
        return inputs + self.sigma * level * noise, targets


@dataclass(frozen=True)
class Rotation:
    """Rotate images by an angle from 0 for the first client to `degrees` for the last."""

    degrees: float = 90.0
    of_test = True

    def __call__(self, examples: Examples, level: float, classes: int | None, generator: torch.Generator) -> Examples:
        inputs, targets = examples
        if error := image_error(inputs):
            raise ValueError(f"client_shift.rotation: {error}")
        return rotate(inputs, torch.full((len(inputs),), math.radians(self.degrees) * level)), targets


@dataclass(frozen=True)
class LabelNoise:
    """Replace a fraction of each client's training labels by another class, drawn uniformly."""

    fraction: float = 0.2
    of_test = False

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"client_shift.labels.fraction={self.fraction:g}\n  valid: above 0, up to 1")

    def __call__(self, examples: Examples, level: float, classes: int | None, generator: torch.Generator) -> Examples:
        inputs, targets = examples
        if not classes or targets.dim() != 1:
            raise ValueError("client_shift.labels: this data has no labels, one per example")
        is_wrong = torch.rand(len(targets), generator=generator) < self.fraction
        other = torch.randint(1, classes, targets.shape, generator=generator)
        return inputs, torch.where(is_wrong, (targets + other) % classes, targets)


def shift_clients(splits: DataSplits, clients: Clients, shifts: Mapping[str, ClientShift], seed: int) -> DataSplits:
    """Apply shifts to each client's examples in memory.

    Random numbers are a function of (seed, name of the shift, client, part).

    Args:
        splits: the data set, left unchanged.
        clients: the examples of each client.
        shifts: by name, applied in order.
        seed: seed of the run.

    Raises:
        ValueError: the data is in per-client files, or a shift does not apply to such examples.
    """
    if not shifts:
        return splits
    if splits.homes is not None:
        raise ValueError("client_shift= with data.files=: only pooled data can be shifted.\n  leave client_shift= out")
    fetched = {part: _fetch_all(source) for part, source in splits.parts.items()}
    if not all(isinstance(column, Tensor) for column in fetched["train"]):
        inputs, targets = map(describe, fetched["train"])
        raise ValueError(
            f"client_shift=: only inputs and targets that are one tensor each can be shifted; inputs are {inputs}, and "
            f"targets {targets}\n  leave client_shift= out"
        )
    for client in range(len(clients)):
        level = client / max(len(clients) - 1, 1)
        for name, shift in shifts.items():
            for part, ids in _shifted_ids(splits, clients, client, shift).items():
                (inputs, targets), rows = fetched[part], torch.from_numpy(ids)
                examples = (inputs[rows], targets[rows])
                stream = generator(seed, "skew", name, client, part)
                inputs[rows], targets[rows] = shift(examples, level, splits.classes, stream)
    sources = {part: TensorSource(*fetched[part], source.client_ids) for part, source in splits.parts.items()}
    return splits.with_parts(**sources)


def _shifted_ids(splits: DataSplits, clients: Clients, client: int, shift: ClientShift) -> dict[str, np.ndarray]:
    """Return a client's examples of each part that is shifted. Validation examples are shifted as their source is."""
    held_out = {"test": clients.test[client]}
    if splits.has_validation:
        train, held_out["validation"] = clients.train[client], clients.validation[client]
    else:
        train = np.concatenate((clients.train[client], clients.validation[client]))
    return {"train": train, **(held_out if shift.of_test else {})}


def _fetch_all(source: Source) -> Examples:
    inputs, targets = source.fetch(torch.arange(len(source)))
    return map_tensors(torch.clone, inputs), map_tensors(torch.clone, targets)  # a source may return its own memory
