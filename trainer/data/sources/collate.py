"""From the items of a torch data set to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate


def collate(dataset: Any, items: list[Any]) -> tuple[Tensor, Tensor]:
    """The inputs and targets of these items of a data set. Raises ValueError for items that are not pairs."""
    batch = default_collate(items)
    if not (isinstance(batch, Sequence) and len(batch) == 2):
        raise ValueError(
            f"{type(dataset).__name__} gives items that are not (input, target) pairs.\n"
            "  wrap it in a Dataset whose items are pairs"
        )
    return batch[0], batch[1]
