"""A language model's losses are means over the targets that are not ignored, in training and in evaluation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.laws.cases import Records, assert_close, leaves
from tests.support.runs import make_clients, make_run
from trainer.data import DataSplits, ExampleWeights, TensorSource
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop.fit import fit
from trainer.tasks import LanguageModelling
from trainer.utils.seeding import generator

EXAMPLES, TESTS, LENGTH, VOCABULARY, BATCH = 21, 5, 6, 7, 8
LR = 0.5
WEIGHTS = torch.tensor([1.0, 0.0, 2.0] * 7)


class Bigrams(nn.Module):
    """Scores the next token by the last one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def padded() -> tuple[Tensor, Tensor]:
    """Return sequences of 0 to 6 tokens; padding is ignored. The first ones are whole."""
    numbers = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (EXAMPLES + TESTS, LENGTH + 1), generator=numbers)
    lengths = torch.randint(0, LENGTH + 1, (EXAMPLES + TESTS, 1), generator=numbers)
    lengths[:3] = LENGTH
    targets = tokens[:, 1:].masked_fill(torch.arange(LENGTH) >= lengths, -100)
    return tokens[:, :-1].contiguous(), targets


class Unlisted(TensorDataset):
    """Examples whose targets are seen one by one."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.columns, self.tensors = self.tensors, ()

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(column[index] for column in self.columns)


def train_padded(choices: dict[str, Any], in_memory: bool) -> tuple[dict[str, Any], Metrics]:
    inputs, targets = padded()
    make = TensorSource if in_memory else Unlisted
    splits = (make(inputs[part], targets[part]) for part in (slice(EXAMPLES), slice(EXAMPLES, None)))
    with distributed() as topology:
        records = Records()
        run = make_run(
            topology,
            [EXAMPLES],
            module=Bigrams(),
            task=LanguageModelling(),
            data=DataSplits(*splits, VOCABULARY),
            clients=make_clients([EXAMPLES], TESTS),
            optimizer=partial(torch.optim.SGD, lr=LR),
            **choices,
        )
        return leaves(fit(run, [records]).model.state_dict()), records.rounds[-1]


def by_hand(weights: Tensor) -> tuple[dict[str, Any], float, float]:
    """Return the weights after an epoch of steps on the mean loss, the loss over the epoch, and that of the tests."""
    model, (inputs, targets) = Bigrams(), padded()
    optimizer, total, kept = torch.optim.SGD(model.parameters(), lr=LR), 0.0, 0.0
    for ids in torch.randperm(EXAMPLES, generator=generator(0, "order", 0, 0)).split(BATCH):
        optimizer.zero_grad()
        losses = F.cross_entropy(model(inputs[ids]).flatten(0, 1), targets[ids].flatten(), reduction="none")
        of_tokens = weights[ids].double().repeat_interleave(LENGTH) * (targets[ids].flatten() >= 0)
        loss_sum, count = (losses * of_tokens).sum(), of_tokens.sum()
        (loss_sum / count).backward()
        optimizer.step()
        total, kept = total + loss_sum.item(), kept + count.item()
    tests = F.cross_entropy(model(inputs[EXAMPLES:]).flatten(0, 1), targets[EXAMPLES:].flatten()).item()
    return leaves(model.state_dict()), total / kept, tests


CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"weights": ExampleWeights(WEIGHTS, (21.0,))},
    "micro-batches": {"micro_batch_size": 2},
}


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize(("size", "in_memory"), [(1, True), (1, False), (3, True)])
def test_ignored_targets_do_not_count(ranks, size: int, in_memory: bool, choices: str) -> None:
    """The reference is a loop by hand, with the means that torch's cross-entropy has."""
    weights = WEIGHTS if choices == "weighted" else torch.ones(EXAMPLES)
    parameters, trained, tested = by_hand(weights)
    for ours, metrics in ranks(size).run(train_padded, CHOICES[choices], in_memory):
        assert_close(ours, parameters)
        assert metrics["train/loss"] == pytest.approx(trained, rel=1e-9)
        assert metrics["test/loss"] == pytest.approx(tested, rel=1e-6)
        assert metrics["test/perplexity"] == pytest.approx(math.exp(tested), rel=1e-6)
