"""Texts as windows of bytes or tokens, and bits a byte: the loss in bits over the bytes of the text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.support.runs import make_clients, make_run
from tests.support.tokenizers import SENTENCES, save_tokenizer
from trainer.data import text
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.models import GPT
from trainer.tasks import LanguageModelling

TEXT = "".join(SENTENCES) * 12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    return tmp_path / "a.txt"


def test_windows_of_tokens_are_those_of_the_whole_text(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("trainer.data.readers.text.PIECE", 100)
    folder = save_tokenizer(path.parent / "saved")
    splits = text(path, 16, tokenizer=folder)
    rows = [*splits.train.fetch(torch.arange(len(splits.train))), *splits.test.fetch(torch.arange(len(splits.test)))]
    assert splits.text_format
    tokens = splits.text_format.encode(TEXT)
    assert torch.cat([rows[0], rows[2]]).flatten().tolist() == tokens[: (len(tokens) - 1) // 16 * 16]
    assert torch.cat([rows[1], rows[3]]).flatten().tolist() == tokens[1 : (len(tokens) - 1) // 16 * 16 + 1]
    assert splits.classes == max(tokens) + 1 or (splits.classes or 0) > max(tokens)


@pytest.mark.parametrize("is_tokenized", [False, True])
def test_bits_a_byte_are_the_bits_of_the_text_over_its_bytes(path: Path, is_tokenized: bool) -> None:
    """The reference decodes the targets of the test set, in which no character is cut, and counts the bytes."""
    path.write_text(SENTENCES[0] * 20)
    if is_tokenized:
        pytest.importorskip("transformers")
    splits = text(path, 16, tokenizer=save_tokenizer(path.parent / "saved") if is_tokenized else None)
    assert splits.text_format and splits.classes
    torch.manual_seed(0)
    module = GPT(splits.classes, 16, layers=1, heads=2, width=16)
    choices: dict[str, Any] = {
        "module": module,
        "data": splits,
        "clients": make_clients([len(splits.train)], len(splits.test)),
        "task": LanguageModelling(splits.text_format.token_bytes),
        "eval.batch_size": 5,
        "optimizer": lambda named: torch.optim.SGD([parameter for _, parameter in named], lr=0.0),
    }
    with distributed() as topology:
        metrics = fit(make_run(topology, [len(splits.train)], **choices)).metrics
    inputs, targets = splits.test.fetch(torch.arange(len(splits.test)))
    with torch.no_grad():
        nats = F.cross_entropy(module.eval()(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
    size = len(splits.text_format.decode(targets.flatten().tolist()).encode())
    assert metrics["test/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    if not is_tokenized:
        assert metrics["test/bits_per_byte"] == pytest.approx(metrics["test/loss"] / math.log(2), rel=1e-12)


def test_ignored_targets_and_tokens_without_bytes() -> None:
    """Of four targets one is ignored, and one ends a document: two with two bytes, and three losses."""
    task = LanguageModelling(torch.tensor([2, 0, 5]).numpy())
    outputs, targets = torch.zeros(1, 4, 3), torch.tensor([[0, -100, 1, 0]])
    sums = task.score_sums(outputs, targets)
    assert task.summary(sums.sum(0), task.counted_units(targets).item())["bits_per_byte"] == pytest.approx(
        3 * math.log2(3) / 4
    )
    assert math.isnan(task.summary(torch.zeros(2), 0)["bits_per_byte"])
