"""Reader of conversations: JSON lines of messages, or of prompts and responses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.readers.cache import name_file_in_errors
from trainer.data.readers.test_split import draw_test_mask, test_fraction_errors
from trainer.data.sources.base import DataSplits
from trainer.data.sources.conversations import ConversationSource
from trainer.data.sources.text_format import TextFormat
from trainer.data.tokenization.chat import ChatTokenizer, Conversation, Message, pack
from trainer.data.tokenization.documents import read_json_lines
from trainer.data.tokenization.tokenizer import load_tokenizer
from trainer.utils.errors import raise_errors
from trainer.utils.text import first_few

MAX_NAMED = 5  # lines in a message


@dataclass(frozen=True)
class Fields:
    """The names of the fields of a line: of its messages, or of a prompt and a response; and of its natural client."""

    messages: str
    prompt: str
    response: str
    client_ids: str | None

    def messages_of(self, line: dict[str, Any]) -> list[Message]:
        """Return the messages of a line.

        Raises:
            ValueError: it has none, or they are no list of objects with roles and contents.
        """
        messages: Any
        if self.messages in line:
            messages = line[self.messages]
        elif self.prompt in line and self.response in line:
            messages = [
                {"role": "user", "content": line[self.prompt]},
                {"role": "assistant", "content": line[self.response]},
            ]
        else:
            raise ValueError(
                f"has neither {self.messages} nor {self.prompt} and {self.response}; its fields: {', '.join(line)}"
            )
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{self.messages} is no list of messages")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise ValueError('a message is no {"role": "user", "content": "..."}')
            if not isinstance(message["content"], str | list | None):
                raise ValueError(f"the content of a message is no text: {message['content']}")
        return messages

    def client_of(self, line: dict[str, Any]) -> str:
        """Return the natural client of a line; raise ValueError if it has none."""
        assert self.client_ids is not None
        client = line.get(self.client_ids)
        if isinstance(client, str | int) and not isinstance(client, bool):
            return str(client)
        raise ValueError(f"{self.client_ids}={client} is no integer or text")


def chat(
    path: str | Path,
    tokenizer: str | Path,
    length: int = 1024,
    messages: str = "messages",
    prompt: str = "prompt",
    response: str = "response",
    client_ids: str | None = None,
    packed: bool = False,
    test: float = 0.1,
    test_path: str | Path | None = None,
    validation_path: str | Path | None = None,
) -> DataSplits:
    """Read conversations into memory, as tokens of which the answers are learnt.

    Args:
        path: JSON lines, compressed if the name ends with .gz.
        tokenizer: with a chat template, see `load_tokenizer`.
        length: most tokens of an example; longer conversations are cut at the end, and left out if no answer remains.
        messages: field of a list of {"role", "content"}.
        prompt: field of a question, in lines without messages.
        response: field of its answer.
        client_ids: field of the natural clients.
        packed: whether an example has as many conversations as fit into `length`, all of one client.
        test: fraction of the conversations to draw as the test set.
        test_path: a file of test conversations instead.
        validation_path: a file of validation conversations.

    Raises:
        ValueError: lists what is wrong with lines, the tokenizer, or its template.
    """
    errors = test_fraction_errors(test)
    raise_errors([*errors, f"data.length={length}\n  valid: at least 2"] if length < 2 else errors)
    template = ChatTokenizer(load_tokenizer(tokenizer))
    fields = Fields(messages, prompt, response, client_ids)
    paths = {"train": path, "test": test_path, "validation": validation_path}
    files = {
        part: _read(Path(each).expanduser(), template, fields, length)
        for part, each in paths.items()
        if each is not None
    }
    names, numbers = np.unique([client for _, clients in files.values() for client in clients], return_inverse=True)
    owners = np.split(numbers.astype(np.int64), np.cumsum([len(clients) for _, clients in files.values()])[:-1])
    parts = {
        part: (rows, who, np.arange(len(rows))) for (part, (rows, _)), who in zip(files.items(), owners, strict=True)
    }
    if test_path is None:
        rows, who, _ = parts["train"]
        is_test = draw_test_mask(len(rows), test, who if client_ids else None)
        parts |= {"train": (rows, who, np.flatnonzero(~is_test)), "test": (rows, who, np.flatnonzero(is_test))}
    known, pad = template.tokenizer, template.tokenizer.padding
    sources = {
        part: _make_source(*chosen, length, pad, packed, client_ids is not None) for part, chosen in parts.items()
    }
    text_format = TextFormat(template.encode_prompt, known.decode, length, template.end_tokens(), known.token_bytes)
    clients = tuple(names.tolist()) if client_ids else ()
    splits = DataSplits(sources["train"], sources["test"], known.vocabulary, clients, text_format=text_format)
    return splits.with_parts(**sources)


def _read(path: Path, template: ChatTokenizer, fields: Fields, length: int) -> tuple[list[Conversation], list[str]]:
    """Return the conversations of a file, and the natural client of each."""
    rows, clients, errors, cut = [], [], [], 0
    with name_file_in_errors(path):
        for number, line in read_json_lines(path):
            try:
                conversation = template.encode(fields.messages_of(line))
                client = fields.client_of(line) if fields.client_ids else ""
                if not conversation.is_answer.any():
                    raise ValueError("has no answer, a message of the role assistant after another one")
            except ValueError as error:
                errors.append(f"line {number}: {error}")
                continue
            short = Conversation(conversation.tokens[: length + 1], conversation.is_answer[: length + 1])
            if short.is_answer[1:].any():
                rows.append(short)
                clients.append(client)
            else:
                cut += 1
        raise_errors(first_few(errors, MAX_NAMED))
        if not rows:
            raise ValueError(f"no conversation has an answer within data.length={length} tokens: set a larger one")
    if cut:
        logging.getLogger(__name__).warning("%s: %d conversations are left out: no answer within %d", path, cut, length)
    return rows, clients


def _make_source(
    conversations: Sequence[Conversation],
    owners: np.ndarray,
    ids: np.ndarray,
    length: int,
    pad: int,
    packed: bool,
    has_clients: bool,
) -> ConversationSource:
    """Make a source of some conversations; pack those of each natural client."""
    if not packed:
        examples = [[conversations[index]] for index in ids]
        return ConversationSource(examples, pad, client_ids=owners[ids] if has_clients else None)
    examples, clients = [], []
    for client in np.unique(owners[ids]):
        members = ids[owners[ids] == client]
        packs = pack([len(conversations[index].tokens) - 1 for index in members], length)
        examples += [[conversations[members[item]] for item in items] for items in packs]
        clients += [client] * len(packs)
    return ConversationSource(examples, pad, True, np.array(clients) if has_clients else None)
