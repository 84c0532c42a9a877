"""Inputs that are more than one tensor: the same run as with one tensor, and padding that changes no figure."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.laws.cases import (
    CLASSES,
    SIZES,
    TEST_EXAMPLES,
    assert_close,
    assert_same,
    figures,
    tiny_data,
    tiny_model,
    train,
)
from tests.laws.test_midround import assert_left_and_bit_equal
from tests.support.runs import make_clients
from trainer.data import DataSplits, MapDatasetSource, Padding, Source, TensorSource
from trainer.loop.options import RoundOptions
from trainer.tasks import LanguageModelling
from trainer.utils.seeding import generator

EXAMPLES = sum(SIZES)
VOCABULARY, LONGEST, LR = 7, 9, 0.1


class Joined(nn.Module):
    """The tiny model of features that come in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = tiny_model().double()

    def forward(self, left: Tensor, right: Tensor | list[Tensor]) -> Tensor:
        return self.whole(torch.cat([left, right if isinstance(right, Tensor) else right[0]], 1))


class Whole(Joined):
    """The same model of the features together."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.whole(inputs)


class Items(Dataset[Any]):
    """The examples of a source, one at a time."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.source.fetch(torch.tensor([index]))
        return ({name: part[0] for name, part in inputs.items()} if isinstance(inputs, dict) else inputs[0]), targets[0]


def by_key(inputs: Tensor, targets: Tensor) -> Source:
    return TensorSource({"left": inputs[:, :2].contiguous(), "right": inputs[:, 2:].contiguous()}, targets)


FORMS = {
    "dict": by_key,
    "tuple": lambda inputs, targets: TensorSource((inputs[:, :2].contiguous(), inputs[:, 2:].contiguous()), targets),
    "nested": lambda inputs, targets: TensorSource({"left": inputs[:, :2], "right": [inputs[:, 2:]]}, targets),
    "items": lambda inputs, targets: MapDatasetSource(Items(by_key(inputs, targets))),
}


def choices_of(form: str | None) -> dict[str, Any]:
    """Return the choices of a run whose features come in this form, or else as one tensor."""
    data = tiny_data(EXAMPLES)
    if form is None:
        return {"module": Whole()}
    parts = (FORMS[form](part.inputs, part.targets) for part in (data.train, data.test))  # type: ignore[attr-defined]
    return {"module": Joined(), "data": DataSplits(*parts, CLASSES)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "name"), [(1, "sync"), (2, "fedavg")])
def test_features_in_parts_train_as_one_tensor_bit_for_bit(ranks, size: int, name: str, form: str) -> None:
    for ours, theirs in zip(
        ranks(size).run(train, name, 1, choices_of(form) | {"micro_batch_size": 1}),
        ranks(size).run(train, name, 1, choices_of(None) | {"micro_batch_size": 1}),
        strict=True,
    ):
        assert_same(ours.model, theirs.model)
        assert_same(figures(ours.rounds[-1]), figures(theirs.rounds[-1]))


class Sentences(Dataset[Any]):
    """Sentences of 1 to LONGEST tokens, and a label each, or the next token at each place."""

    def __init__(self, examples: int, seed: int, next_token: bool = False):
        drawn = generator(seed, "sentences")
        lengths = torch.randint(1, LONGEST + 1, (examples,), generator=drawn).tolist()
        self.rows = [torch.randint(VOCABULARY, (length + 1,), generator=drawn) for length in lengths]
        self.next_token = next_token

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Any]:
        row = self.rows[index]
        return {"tokens": row[:-1]}, (row[1:] if self.next_token else int(row.sum()) % CLASSES)


class Words(nn.Module):
    """Scores a sentence by the mean of its words, or the next word by the last one."""

    def __init__(self, next_token: bool = False) -> None:
        super().__init__()
        shape = (VOCABULARY, VOCABULARY if next_token else CLASSES)
        self.table = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        self.next_token = next_token

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        words = self.table[tokens].square()
        if self.next_token:
            return words
        return (words * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)


def ragged(next_token: bool = False, in_order: bool = False) -> dict[str, Any]:
    """Return the choices of a run on sentences."""
    padding = Padding({"tokens": 0}, targets=-100 if next_token else None)
    parts = [Sentences(EXAMPLES, 1, next_token), Sentences(TEST_EXAMPLES, 2, next_token)]
    data = DataSplits(*(MapDatasetSource(part, collate_fn=padding) for part in parts), None)
    task = {"task": LanguageModelling()} if next_token else {}
    return {"module": Words(next_token), "data": data, "optimizer": partial(torch.optim.SGD, lr=LR), **task}


def all_as_long(choices: dict[str, Any]) -> dict[str, Any]:
    """Return the same choices, of sentences that were all padded to the longest beforehand."""
    sources = (
        TensorSource(*part.fetch(torch.arange(len(part)))) for part in (choices["data"].train, choices["data"].test)
    )
    return choices | {"data": DataSplits(*sources, None)}


@pytest.mark.parametrize("next_token", [False, True], ids=["label", "next token"])
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}], ids=["batch", "micro-batches"])
def test_padding_changes_no_figure(ranks, options: dict[str, Any], next_token: bool) -> None:
    """One rank or two, whole batches or parts: as with sentences that all have the same length."""
    theirs = ranks(1).run(train, "fedavg", 1, all_as_long(ragged(next_token)))[0]
    for size in (1, 2):
        for ours in ranks(size).run(train, "fedavg", 1, ragged(next_token) | options):
            assert_close(ours.model, theirs.model, 1e-11)
            assert_close(figures(ours.rounds[-1]), figures(theirs.rounds[-1]), 1e-9)


def test_sentences_train_as_in_a_loop_that_pads_nothing(ranks) -> None:
    """The reference reads one sentence at a time."""
    model, data = Words(), Sentences(EXAMPLES, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for ids in torch.randperm(EXAMPLES, generator=generator(0, "order", 0, 0)).split(4):
        optimizer.zero_grad()
        for tokens, label in ((data[index][0]["tokens"], data[index][1]) for index in ids.tolist()):
            outputs = model(tokens[None], torch.ones(1, len(tokens), dtype=torch.int64))
            (F.cross_entropy(outputs, torch.tensor([label])) / len(ids)).backward()
        optimizer.step()
    whole = {"sizes": [EXAMPLES], "clients": make_clients([EXAMPLES], TEST_EXAMPLES), "rounds": 1}
    ours = ranks(2).run(train, "sync", 1, ragged() | whole)[0]
    assert_close(ours.model, {"table": model.table.detach()})


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_a_run_on_sentences_is_resumed_in_mid_round(ranks, name: str, tmp_path: Path) -> None:
    choices = ragged() | {"round": RoundOptions(steps=5)}
    assert_left_and_bit_equal(ranks(2), name, 2, choices, tmp_path, {0: (0, 2)})
