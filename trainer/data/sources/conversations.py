"""Source of conversations: tokens of different lengths, of which the answers are targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.data.sources.column import check_not_empty, integer_column
from trainer.data.sources.padding import Padding
from trainer.data.tokenization.chat import Conversation
from trainer.tasks.base import IGNORED
from trainer.utils.tensor_trees import Tree


class ConversationSource:
    """Source of conversations, each or several of them an example, padded to the longest of a batch.

    Inputs are {"input_ids"}, all tokens but the last; targets the same tokens shifted by one, and -100 for those that
    are no answers. Padding comes last, where it changes nothing of a model that looks back, so there is no mask. Of
    packed conversations the inputs have `position_ids` too, which begin at 0 in each of them.

    Args:
        examples: the conversations of each example.
        pad: the token that pads inputs.
        is_packed: whether the inputs have position ids.
        client_ids: natural client of each example, int64 [N].
    """

    labels: np.ndarray | None = None
    is_read_by_batch = True

    def __init__(
        self,
        examples: Sequence[Sequence[Conversation]],
        pad: int,
        is_packed: bool = False,
        client_ids: np.ndarray | None = None,
    ) -> None:
        check_not_empty(len(examples))
        self.padding = Padding({"input_ids": pad, **({"position_ids": 0} if is_packed else {})}, IGNORED, mask=None)
        self.client_ids = integer_column("client_ids", client_ids, len(examples))
        conversations = [conversation for example in examples for conversation in example]
        lengths = [sum(len(each.tokens) - 1 for each in example) for example in examples]
        targets = [np.where(each.is_answer, each.tokens, IGNORED)[1:] for each in conversations]
        self.starts = np.cumsum([0, *lengths])
        self.columns = {"input_ids": _join([each.tokens[:-1] for each in conversations])}
        if is_packed:
            self.columns["position_ids"] = _join([np.arange(len(each.tokens) - 1) for each in conversations])
        self.targets_in_order = _join(targets)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def fetch(self, ids: Tensor) -> tuple[Tree, Tree]:
        rows = [slice(self.starts[index], self.starts[index + 1]) for index in ids.tolist()]
        return self.padding(
            [
                ({name: column[row].long() for name, column in self.columns.items()}, self.targets_in_order[row].long())
                for row in rows
            ]
        )

    def fingerprint_data(self) -> list[np.ndarray]:
        return [self.starts, *(column.numpy() for column in (*self.columns.values(), self.targets_in_order))]


def _join(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))
