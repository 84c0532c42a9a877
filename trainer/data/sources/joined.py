"""Two sources as one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.data.sources.base import Source
from trainer.utils.tensor_trees import Tree, concatenate, take


class JoinedSource:
    """The examples of one source, and behind them those of another."""

    def __init__(self, first: Source, second: Source) -> None:
        self.first, self.second = first, second
        self.labels = _join(first.labels, second.labels)
        self.client_ids = _join(first.client_ids, second.client_ids)
        self.column_names = getattr(first, "column_names", ())

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def fetch(self, ids: Tensor) -> tuple[Tree, Tree]:
        is_second = ids >= len(self.first)
        if not is_second.any():
            return self.first.fetch(ids)
        if is_second.all():
            return self.second.fetch(ids - len(self.first))
        parts = (self.first.fetch(ids[~is_second]), self.second.fetch(ids[is_second] - len(self.first)))
        order = torch.cat(((~is_second).nonzero(), is_second.nonzero())).flatten().argsort()
        padding = getattr(self.first, "padding", None)
        return take((padding.join if padding else concatenate)(parts), order)


def _join(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate((first, second))
