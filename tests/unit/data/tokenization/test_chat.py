"""Chat templates: which tokens are answers, with and without marks in the template, and templates that do not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tokenizers import CHATML, MARKED, save_tokenizer
from trainer.data.tokenization.chat import ChatTokenizer, pack
from trainer.data.tokenization.tokenizer import load_tokenizer

pytest.importorskip("transformers")

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "naïve 日本?"},
    {"role": "assistant", "content": " it's 12,345 🙂"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "the fox\n\njumps"},
    {"role": "user", "content": "bye"},
]
INSTRUCT = (  # a prompt ends with a space, and the first token of an answer may begin with it
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim }}"
    "<|endoftext|>{% else %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ' }}{% endif %}"
)
THINKS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
LAST_IS_OTHER = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATES = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}" + CHATML


def chat_of(folder: Path, template: str | None) -> ChatTokenizer:
    return ChatTokenizer(load_tokenizer(save_tokenizer(folder / "saved", template)))


def answers(chat: ChatTokenizer, messages: list[Any]) -> str:
    """Return the texts of the answers, one after the other."""
    found = chat.encode(messages)
    return chat.tokenizer.fast.decode(found.tokens[found.is_answer].tolist(), skip_special_tokens=False)


def test_prefixes_find_the_answers_that_a_template_marks(tmp_path: Path) -> None:
    plain, marked = chat_of(tmp_path / "plain", CHATML), chat_of(tmp_path / "marked", MARKED)
    assert marked.marks_answers and not plain.marks_answers
    for turns in (TURNS, TURNS[1:3], TURNS[:5]):
        ours, theirs = plain.encode(turns), marked.encode(turns)
        reference = marked.tokenizer.backend.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ours.tokens.tolist() == theirs.tokens.tolist() == reference["input_ids"]
        assert ours.is_answer.tolist() == theirs.is_answer.tolist() == list(map(bool, reference["assistant_masks"]))
    assert answers(plain, TURNS) == " it's 12,345 🙂<|im_end|>\nthe fox\n\njumps<|im_end|>\n"
    assert answers(plain, [*TURNS[2:3], *TURNS[1:3]]) == " it's 12,345 🙂<|im_end|>\n"  # the first one answers nothing


def test_a_token_with_a_letter_of_the_answer_is_learnt(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, INSTRUCT)
    assert answers(chat, TURNS[1:5]) == "it's 12,345 🙂<|endoftext|> the fox\n\njumps<|endoftext|>"
    whole = chat.tokenizer.backend.apply_chat_template(TURNS[1:5], tokenize=False)
    assert chat.encode(TURNS[1:5]).tokens.tolist() == chat.tokenizer.encode([whole])[0]


def test_the_tokens_that_end_an_answer(tmp_path: Path) -> None:
    for name, template in (("plain", CHATML), ("marked", MARKED)):
        chat = chat_of(tmp_path / name, template)
        assert chat.tokenizer.decode(chat.encode_prompt("why?")) == "user\nwhy?\nassistant\n"
        ends = {chat.tokenizer.token_of(text, "end") for text in ("<|im_end|>", "<|endoftext|>")}
        assert chat.end_tokens() == ends


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (None, TURNS, r"data.tokenizer=.*saved has no chat template\.\n  take the tokenizer of a model for chats"),
        (THINKS, TURNS[1:3], r"asks for message 2 by '.*<think>\\n', with which the message does not begin"),
        (LAST_IS_OTHER, TURNS[1:5], "writes message 2 otherwise when others follow"),
        (ALTERNATES, TURNS[:3], "the chat template refuses the messages: a user speaks first"),
    ],
)
def test_templates_that_do_not_show_the_answers_are_refused(
    tmp_path: Path, template: str | None, turns: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chat_of(tmp_path, template).encode(turns)


def test_a_single_answer_needs_nothing_of_the_template(tmp_path: Path) -> None:
    assert "it's" in answers(chat_of(tmp_path, LAST_IS_OTHER), TURNS[1:3])


@given(lengths=st.lists(st.integers(1, 30), max_size=60), capacity=st.integers(8, 30))
def test_packs_have_every_item_once_and_are_no_fuller_than_they_may_be(lengths: list[int], capacity: int) -> None:
    packs = pack(lengths, capacity)
    assert sorted(item for items in packs for item in items) == [*range(len(lengths))]
    sums = [sum(lengths[item] for item in items) for items in packs]
    assert all(total <= capacity or len(items) == 1 for total, items in zip(sums, packs, strict=True))
    # Best fit leaves at most one pack half empty.
    assert sum(total <= capacity / 2 for total in sums) <= 1
    assert packs == pack(lengths, capacity) and np.all([items == sorted(items) for items in packs])
