"""Source of texts as tokens, of different lengths, with a target each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.data.sources.column import as_targets, check_not_empty, integer_column, label_column
from trainer.data.sources.padding import Padding
from trainer.utils.tensor_trees import Tree


class TextSource:
    """Source of texts in memory: inputs {"input_ids", "attention_mask"}, padded to the longest of a batch.

    Args:
        texts: the tokens of each text.
        targets: of each text, [N, ...].
        pad: the token that pads inputs.
        vocabulary: number of different tokens.
        client_ids: natural client of each text, int64 [N].
    """

    is_read_by_batch = True

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        targets: Tensor,
        pad: int,
        vocabulary: int,
        client_ids: np.ndarray | None = None,
    ) -> None:
        check_not_empty(len(texts))
        self.padding, self.vocabulary = Padding({"input_ids": pad}), vocabulary
        self.targets, self.labels = as_targets(targets), label_column(targets)
        self.client_ids = integer_column("client_ids", client_ids, len(texts))
        self.starts = np.cumsum([0, *map(len, texts)])
        self.tokens = torch.from_numpy(np.fromiter((token for text in texts for token in text), np.int32))

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, ids: Tensor) -> tuple[Tree, Tree]:
        rows = [self.tokens[self.starts[index] : self.starts[index + 1]].long() for index in ids.tolist()]
        return self.padding([({"input_ids": row}, target) for row, target in zip(rows, self.targets[ids], strict=True)])

    def fingerprint_data(self) -> list[np.ndarray]:
        return [self.starts, self.tokens.numpy(), self.targets.numpy()]
