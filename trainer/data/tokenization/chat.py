"""Conversations to tokens, by the chat template of a tokenizer, and which tokens are answers."""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.tokenization.tokenizer import Tokenizer

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks the answers in a template

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """The tokens of a conversation, int64 [T], and which of them are answers, bool [T]."""

    tokens: np.ndarray
    is_answer: np.ndarray


class ChatTokenizer:
    """A tokenizer and its chat template.

    A template that marks answers by `{% generation %}` decides itself which tokens they are. With any other one they
    are the tokens after each prompt for an answer, to the end of the message.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        try:
            template: str = tokenizer.backend.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"data.tokenizer={tokenizer.path} has no chat template.\n"
                "  take the tokenizer of a model for chats, or put a chat_template.jinja into its folder"
            ) from error
        self.marks_answers = bool(GENERATION.search(template))

    def encode(self, messages: Sequence[Message]) -> Conversation:
        """Return the tokens of a conversation.

        Raises:
            ValueError: the template refuses the messages, or does not show where answers begin and end.
        """
        if self.marks_answers:
            encoded = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
            return Conversation(np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"], bool))
        text = self._apply(messages, tokenize=False)
        encoding = self.tokenizer.fast.encode(text, add_special_tokens=False)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        # Some tokenizers leave white space out of offsets, and bytes of one character share theirs.
        starts = np.minimum(starts, np.maximum.accumulate(np.concatenate(([0], ends[:-1]))))
        is_answer = np.zeros(len(ends), bool)
        for first, last in self._answers(messages, text):
            is_answer |= (ends > first) & (starts < last)
        return Conversation(np.array(encoding.ids, np.int64), is_answer)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the tokens of a question, up to where its answer begins."""
        rendered = self._apply([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode([rendered])[0]

    def end_tokens(self) -> frozenset[int]:
        """Return the tokens that end an answer: that of a text, and the special ones of the template."""
        simple = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        special = {token for token, added in self.tokenizer.added_tokens.items() if added.special}
        ends = special & {*simple.tokens[simple.is_answer].tolist()}
        return frozenset(ends if self.tokenizer.end is None else {*ends, self.tokenizer.end})

    def _answers(self, messages: Sequence[Message], text: str) -> Iterator[tuple[int, int]]:
        """Yield the range of characters of each answer to earlier messages."""
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or not index:
                continue
            prompt = self._apply(messages[:index], tokenize=False, add_generation_prompt=True)
            answered = self._apply(messages[: index + 1], tokenize=False)
            if not text.startswith(answered):
                raise ValueError(
                    f"the chat template writes message {index + 1} otherwise when others follow, so where its answer "
                    "ends is not known\n  mark answers in the template by {% generation %}, or end conversations there"
                )
            if not answered.startswith(prompt):
                raise ValueError(
                    f"the chat template asks for message {index + 1} by {prompt[-40:]!r}, with which the message does "
                    "not begin\n  mark answers in the template by {% generation %}"
                )
            yield len(prompt), len(answered)

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        """Apply the template; raise its refusals as ValueErrors."""
        import jinja2

        try:
            return self.tokenizer.backend.apply_chat_template(list(messages), **options)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items of these lengths into packs of this capacity; return the items of each pack, ascending.

    Best fit, the longest first. An item longer than the capacity has a pack of its own.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room of each pack, ascending, and its number
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = bisect_left(free, (lengths[item], -1))
        room, number = free.pop(place) if place < len(free) else (capacity, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(item)
        insort(free, (room - lengths[item], number))
    return sorted(sorted(items) for items in packs)
