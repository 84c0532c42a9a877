"""A step on conversations is one on the mean over all their answers, on any number of ranks, padded or packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.laws.cases import assert_close, leaves
from tests.support.runs import make_clients, make_run
from trainer.data import DataSplits
from trainer.data.sources.conversations import ConversationSource
from trainer.data.tokenization.chat import Conversation, pack
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.models import GPT
from trainer.tasks import LanguageModelling

CONVERSATIONS = 12


def conversations() -> list[Conversation]:
    """Return random conversations of 2 to 16 tokens, each with an answer."""
    numbers = np.random.default_rng(0)
    made = []
    for length in numbers.integers(2, 17, CONVERSATIONS):
        is_answer = numbers.random(length) < 0.5
        is_answer[-1] = True
        made.append(Conversation(numbers.integers(0, 50, length), is_answer))
    return made


def small_gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(50, 16, 1, 2, 16).double()


def train_random(packed: bool, choices: dict[str, Any]) -> dict[str, Any]:
    rows = conversations()
    groups = pack([len(row.tokens) - 1 for row in rows], 16) if packed else [[index] for index in range(len(rows))]
    source = ConversationSource([[rows[index] for index in group] for group in groups], 7, packed)
    clients = make_clients([len(source)], len(source))
    data = {"data": DataSplits(source, source, 50), "clients": clients, "task": LanguageModelling()}
    with distributed() as topology:
        run = make_run(topology, [len(source)], module=small_gpt(), batch_size=len(source), rounds=2, **data, **choices)
        return leaves(fit(run).model.state_dict())


@pytest.mark.parametrize(
    ("size", "packed", "choices"), [(1, False, {}), (2, False, {"micro_batch_size": 2}), (2, True, {})]
)
def test_a_step_is_on_the_mean_over_all_answers_of_the_batch(ranks, size: int, packed: bool, choices: Any) -> None:
    """The reference has each conversation by itself, without padding or packing."""
    module, rows = small_gpt(), conversations()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        count = sum(int(row.is_answer[1:].sum()) for row in rows)
        for row in rows:
            tokens, kept = torch.from_numpy(row.tokens)[None], torch.from_numpy(row.is_answer)[1:]
            losses = F.cross_entropy(module(tokens[:, :-1])[0], tokens[0, 1:], reduction="none")
            ((losses * kept).sum() / count).backward()
        optimizer.step()
    for ours in ranks(size).run(train_random, packed, choices):
        assert_close(ours, leaves(module.state_dict()))
