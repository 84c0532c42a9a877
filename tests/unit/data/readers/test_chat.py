"""Conversations: what is learnt, cut, packed and refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tokenizers import CHATML, MARKED, save_tokenizer
from trainer.data import chat
from trainer.data.loading.unit_counts import count_units
from trainer.data.tokenization.chat import ChatTokenizer
from trainer.data.tokenization.tokenizer import load_tokenizer
from trainer.tasks import LanguageModelling

pytest.importorskip("transformers")

ASKED = ["why?", "the quick brown fox", "naïve", "12,345 and so on", "it's", "jumps over", "dog", "don't"]


def turns(number: int) -> list[dict[str, str]]:
    """Return a conversation; the lengths of its answers differ."""
    answer = " ".join(["fox", "dog", "lazy"] * (number % 5 + 1))
    return [{"role": "user", "content": ASKED[number % 8]}, {"role": "assistant", "content": answer}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", [{"messages": turns(number), "site": ["north", "south"][number % 2]} for number in range(20)])
    return save_tokenizer(tmp_path / "saved", MARKED)


def write(name: str, lines: list[Any]) -> None:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def examples(source: Any) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and targets of every example, without padding."""
    inputs, targets = source.fetch(torch.arange(len(source)))
    lengths = [int(source.starts[row + 1] - source.starts[row]) for row in range(len(source))]
    rows = zip(inputs["input_ids"].tolist(), targets.tolist(), lengths, strict=True)
    return [(ids[:length], wanted[:length]) for ids, wanted, length in rows]


def expected(folder: Path, messages: list[Any], length: int = 1024) -> tuple[list[int], list[int]]:
    """Return tokens and targets by transformers' own mask."""
    encoded = load_tokenizer(folder).backend.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens, mask = encoded["input_ids"][: length + 1], encoded["assistant_masks"][: length + 1]
    return tokens[:-1], [token if kept else -100 for token, kept in zip(tokens[1:], mask[1:], strict=True)]


def test_a_validation_file_has_the_clients_of_the_others(folder: Path) -> None:
    write("b.jsonl", [{"messages": turns(number), "site": "south"} for number in range(3)])
    splits = chat("a.jsonl", folder, client_ids="site", validation_path="b.jsonl")
    assert [len(source) for source in splits.parts.values()] == [18, 2, 3] and splits.client_names == ("north", "south")
    assert splits.validation.client_ids is not None and splits.validation.client_ids.tolist() == [1, 1, 1]
    assert examples(splits.validation) == [expected(folder, turns(number)) for number in range(3)]


def test_answers_are_learnt_and_batches_are_padded_to_their_longest(folder: Path) -> None:
    write("test.jsonl.gz", [{"prompt": turns(7)[0]["content"], "response": turns(7)[1]["content"]}])
    splits = chat("a.jsonl", folder, test_path="test.jsonl.gz", validation_path="a.jsonl")
    assert splits.has_validation and examples(splits.validation) == examples(splits.train)
    assert examples(splits.train) == [expected(folder, turns(number)) for number in range(20)]
    assert examples(splits.test) == [expected(folder, turns(7))]
    for ids in ([0], [0, 4, 1]):
        inputs, targets = splits.train.fetch(torch.tensor(ids))
        longest = max(len(expected(folder, turns(number))[0]) for number in ids)
        assert [*inputs] == ["input_ids"] and inputs["input_ids"].shape == targets.shape == (len(ids), longest)
        assert inputs["input_ids"].dtype == targets.dtype == torch.int64
    counts = count_units(LanguageModelling(), splits.train)
    learnt = [sum(target >= 0 for target in expected(folder, turns(number))[1]) for number in range(20)]
    assert counts is not None and counts.tolist() == learnt


def test_natural_clients_and_a_test_set_of_each(folder: Path) -> None:
    splits = chat("a.jsonl", folder, client_ids="site", test=0.2)
    assert splits.client_names == ("north", "south")
    assert splits.train.client_ids is not None and splits.test.client_ids is not None
    assert [(splits.train.client_ids == k).sum() for k in (0, 1)] == [8, 8]
    assert [(splits.test.client_ids == k).sum() for k in (0, 1)] == [2, 2]
    assert len({len(ids) for ids, _ in examples(splits.train)}) > 1


@pytest.mark.parametrize("site", [None, "site"])
def test_packs_hold_whole_conversations_of_one_client(folder: Path, site: str | None) -> None:
    plain, packed = (chat("a.jsonl", folder, client_ids=site, packed=is_packed, length=90) for is_packed in (0, 1))
    assert len(packed.train) < len(plain.train)
    inputs, _ = packed.train.fetch(torch.arange(len(packed.train)))
    assert [*inputs] == ["input_ids", "position_ids"] and inputs["input_ids"].shape[1] <= 90
    found = []
    for row, (ids, targets) in enumerate(examples(packed.train)):
        starts = [place for place in range(len(ids)) if inputs["position_ids"][row, place] == 0]
        for first, last in zip(starts, [*starts[1:], len(ids)], strict=True):
            client = None if packed.train.client_ids is None else packed.train.client_ids[row]
            found.append((client, ids[first:last], targets[first:last]))
    owners = [None] * len(plain.train) if plain.train.client_ids is None else plain.train.client_ids
    singly = [(owner, *example) for owner, example in zip(owners, examples(plain.train), strict=True)]
    assert sorted(map(str, found)) == sorted(map(str, singly))


def test_long_conversations_are_cut_and_left_out_without_an_answer(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    questions = [len(expected(folder, turns(number))[0]) for number in range(20)]
    length = sorted(questions)[4]
    splits = chat("a.jsonl", folder, length=length, test_path="a.jsonl")
    wanted = [expected(folder, turns(number), length) for number in range(20)]
    assert examples(splits.train) == [each for each in wanted if any(target >= 0 for target in each[1])]
    with pytest.raises(ValueError, match=r"no conversation has an answer within data.length=3 tokens"):
        chat("a.jsonl", folder, length=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, "line 2: has neither messages nor prompt and response; its fields: text"),
        ({"messages": []}, "line 2: messages is no list of messages"),
        ({"messages": [{"from": "human", "value": "x"}]}, 'line 2: a message is no {"role"'),
        ({"messages": [{"role": "user", "content": 3}]}, "line 2: the content of a message is no text: 3"),
        ({"messages": turns(0)[:1], "site": "north"}, "line 2: has no answer"),
        ({"messages": turns(0), "site": 1.5}, "line 2: site=1.5 is no integer or text"),
        ({"messages": turns(0)}, "line 2: site=None is no integer or text"),
    ],
)
def test_bad_lines_are_named(folder: Path, line: dict[str, Any], message: str) -> None:
    write("bad.jsonl", [{"messages": turns(0), "site": "north"}, line, {"messages": 3}])
    with pytest.raises(ValueError, match=r"data.path=bad.jsonl cannot be used:") as error:
        chat("bad.jsonl", folder, client_ids="site")
    assert message in str(error.value) and "line 3: messages is no list" in str(error.value)


def test_the_fingerprint_is_of_all_tokens_and_targets(folder: Path) -> None:
    save_tokenizer(folder.parent / "plain", CHATML)
    first, second = (chat("a.jsonl", folder.parent / name) for name in ("saved", "plain"))
    assert [[*part] for part in first.train.fingerprint_data()] == [[*part] for part in second.train.fingerprint_data()]  # type: ignore[attr-defined]
    assert ChatTokenizer(load_tokenizer(folder)).marks_answers
