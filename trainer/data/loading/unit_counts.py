"""The units of each training example that count in the loss, where a task ignores some, such as padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.data.sources.base import Source
from trainer.data.sources.per_client import PerClientSource
from trainer.tasks import Task

SAMPLE = 256  # examples, evenly spaced, by which a source that is not in memory shows whether it has ignored targets
CHUNK = 1024  # examples that are fetched together


def count_units(task: Task, train: Source) -> Tensor | None:
    """Return the number of units of each training example that count, float32 [N]; None if all do.

    A source that holds its targets in memory is counted there. Of another one a sample is read, and if that has ignored
    targets, or its examples are padded, all of it.
    """
    count: Callable[[Tensor], Tensor] | None = getattr(task, "counted_units", None)
    if count is None:
        return None
    # Local examples have the first ids.
    sources = list(train.local.values()) if isinstance(train, PerClientSource) else [train]
    counts = [_count(count, task, source) for source in sources]
    if all(part is None for part in counts):
        return None
    units = float(task.units(train.fetch(torch.arange(1))[1]))
    whole = [
        torch.full((len(source),), units) if part is None else part.float()
        for part, source in zip(counts, sources, strict=True)
    ]
    return torch.cat([*whole, torch.zeros(len(train) - sum(map(len, whole)))])


def _count(count: Callable[[Tensor], Tensor], task: Task, source: Source) -> Tensor | None:
    """Return the units of each example that count; None if all do."""
    held = getattr(source, "targets", None)
    # Numbers without a sign are read as the source gives them: as they are they cannot equal a negative mark.
    held = held if isinstance(held, Tensor) and held.dtype.is_signed else None
    sample = torch.linspace(0, len(source) - 1, min(len(source), SAMPLE)).long()
    targets = source.fetch(sample)[1] if held is None else held
    counts = count(targets)
    if getattr(source, "padding", None) is None and bool((counts == task.units(targets)).all()):
        return None
    if held is not None:
        return counts
    return torch.cat([count(source.fetch(ids)[1]) for ids in torch.arange(len(source)).split(CHUNK)])
