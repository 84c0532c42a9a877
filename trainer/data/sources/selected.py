"""Some of the examples of a data set as a data set of their own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from trainer.data.sources.base import DataSplits, Fingerprintable, Source, fetch_by_seed
from trainer.data.sources.table import TableSource
from trainer.data.sources.torch_datasets import is_read_by_batch, is_sequential
from trainer.utils.tensor_trees import Tree


class SelectedSource:
    """Some of the examples of a source, numbered anew.

    Args:
        source: has all examples.
        ids: of the selected examples, int64 [N].
    """

    def __init__(self, source: Source, ids: np.ndarray) -> None:
        self.source, self.ids = source, torch.from_numpy(ids)
        self.labels = None if source.labels is None else source.labels[ids]
        self.client_ids = None if source.client_ids is None else source.client_ids[ids]
        self.padding = getattr(source, "padding", None)
        self.is_sequential, self.is_read_by_batch = is_sequential(source), is_read_by_batch(source)

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, ids: Tensor) -> tuple[Tree, Tree]:
        return self.source.fetch(self.ids[ids])

    def fetch_seeded(self, ids: Tensor, seed: int) -> tuple[Tree, Tree]:
        """Return the examples as `fetch` does; what the source draws for each is a function of the seed."""
        return fetch_by_seed(self.source, self.ids[ids], seed)

    def fingerprint_data(self) -> list[np.ndarray]:
        whole = self.source.fingerprint_data() if isinstance(self.source, Fingerprintable) else []
        return [self.ids.numpy(), *whole]


def select_examples(splits: DataSplits, ids: Mapping[str, np.ndarray]) -> DataSplits:
    """Return a data set of some of the examples.

    Args:
        splits: the whole data set.
        ids: int64, ascending, for each of its `parts`.
    """
    selected = splits.with_parts(**{part: _select(source, ids[part]) for part, source in splits.parts.items()})
    selected.weights = None if splits.weights is None else splits.weights[ids["train"]]
    return selected.encoded_by(selected.encoder) if selected.encoder else selected


def _select(source: Source, ids: np.ndarray) -> Source:
    """Return a source of some examples; that of a table keeps its columns, whose encoder is fitted to all silos."""
    return source.select(ids) if isinstance(source, TableSource) else SelectedSource(source, ids)
