"""Tokenizers, loaded from files of the packages tokenizers and transformers. The only place that loads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from trainer.utils.text import first_few

CONTEXT = 1 << 12  # characters beside a piece of a text, on which its tokens may depend
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of vocabularies that fall back to bytes
SPACE = "\u2581"  # in vocabularies of sentencepiece
MAX_NAMED = 12  # special tokens in a message

# Spaces, newlines, digits and letters of several alphabets: by its bytes a tokenizer shows what its tokens stand for.
PROBE = 'It\'s 2,048 bytes:\n\n\t"na\u00efve"  \u65e5\u672c \U0001f642\r\n x\u0301 = <y>; '


class Tokenizer:
    """A tokenizer of the package transformers. Texts become tokens as they are, without special tokens around them.

    Attributes:
        path: the file or folder that it was loaded from.
        backend: the object of transformers.
        vocabulary: number of tokens; all are below it.
    """

    def __init__(self, path: Path, backend: Any) -> None:
        self.path, self.backend = path, backend
        self.fast = backend.backend_tokenizer  # of the package tokenizers
        # A file may cut and pad every text to the length of the sentences that its model was trained on.
        self.fast.no_truncation()
        self.fast.no_padding()
        self.vocabulary = max(self.fast.get_vocab().values()) + 1

    @property
    def end(self) -> int | None:
        """The token that ends a text; None if there is none."""
        return self.backend.eos_token_id

    @property
    def padding(self) -> int:
        """The token that fills what is never looked at: that of the tokenizer, or else any."""
        return self.backend.pad_token_id or 0

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text."""
        return [encoding.ids for encoding in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_examples(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Return the tokens of each text with the special ones around it, `length` at most."""
        encoded = self.backend(list(texts), truncation=True, max_length=length, return_attention_mask=False)
        self.fast.no_truncation()  # which the object keeps for later texts
        return encoded["input_ids"]

    def encode_parts(self, parts: Sequence[TextPart]) -> list[np.ndarray]:
        """Return the tokens that begin in each part of a text."""
        encodings = self.fast.encode_batch([part.with_context for part in parts], add_special_tokens=False)
        return [part.select(encoding) for part, encoding in zip(parts, encodings, strict=True)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return self.fast.decode(list(tokens), skip_special_tokens=True)

    def token_of(self, text: str, key: str) -> int:
        """Return the token that is written like this, such as <|endoftext|>; raise ValueError if there is none."""
        if (token := self.fast.token_to_id(text)) is not None:
            return token
        special = first_few(self.special_tokens, MAX_NAMED)
        raise ValueError(
            f"{key}={text}: the tokenizer {self.path} has no such token.\n  its special ones: {', '.join(special)}"
        )

    @cached_property
    def added_tokens(self) -> dict[int, Any]:
        """The tokens that were added to the vocabulary, with `content` and `special` of each."""
        return self.fast.get_added_tokens_decoder()

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens as they are written."""
        return [added.content for added in self.added_tokens.values() if added.special]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary."""
        digest = blake2b(digest_size=8)
        for text, token in sorted(self.fast.get_vocab().items()):
            digest.update(f"{token} {text}\n".encode())
        return digest.hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        """The number of bytes that each token adds to a text, int64 [vocabulary], 0 for special tokens.

        None if they are not known: for some tokenizers the bytes of the tokens do not add up to those of the text.
        """
        for count in (len, _count_bytes):
            counts = np.zeros(self.vocabulary, np.int64)
            for text, token in self.fast.get_vocab().items():
                counts[token] = count(text)
            for token, added in self.added_tokens.items():
                counts[token] = 0 if added.special else len(added.content.encode())
            (tokens,) = self.encode([PROBE])
            if counts[tokens].sum() == len(PROBE.encode()):
                return counts
        return None


def _count_bytes(token: str) -> int:
    """Return the bytes of a token of sentencepiece; those of byte-level vocabularies have a character for each byte."""
    return 1 if BYTE_TOKEN.fullmatch(token) else len(token.replace(SPACE, " ").encode())


class TextPart:
    """A part of a text between its neighbours, by which a tokenizer sees how it begins and ends.

    Args:
        before: the end of what comes before it.
        text: the part.
        after: the beginning of what comes after it.
    """

    def __init__(self, before: str, text: str, after: str) -> None:
        self.with_context = before + text + after
        self.first, self.last = len(before), len(before) + len(text)
        self.bytes = len(text.encode())

    def select(self, encoding: Any) -> np.ndarray:
        """Return the tokens of an encoding of `with_context` that begin in this part, int64."""
        ids = np.asarray(encoding.ids, np.int64)
        if len(self.with_context) == self.last - self.first or not len(ids):
            return ids
        starts = np.asarray(encoding.offsets, np.int64)[:, 0]
        return ids[(self.first <= starts) & (starts < self.last)]


def divide(pieces: Iterable[str], context: int = CONTEXT) -> Iterator[TextPart]:
    """Yield the parts of a text that is too long to be encoded at once. Their tokens are those of the whole text.

    Args:
        pieces: the text; each but the last has at least `context` characters.
        context: characters on each side of a part on which its tokens may depend.
    """
    before, text = "", ""
    for following in chain(pieces, [""]):
        if text:
            yield TextPart(before, text, following[:context])
        before, text = (before + text)[-context:], following


def load_tokenizer(path: str | Path, key: str = "data.tokenizer") -> Tokenizer:
    """Load a tokenizer. Nothing is downloaded, and no code of the folder is run.

    Args:
        path: a tokenizer.json of the package tokenizers, or a folder that save_pretrained of transformers has written.
        key: names the path in errors.

    Raises:
        ValueError: there is no such file, the package is not installed, or it cannot read the file.
    """
    valid = "a tokenizer.json, or a folder written by save_pretrained of transformers; nothing is downloaded"
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{key}={path}: there is no such file or folder\n  valid: {valid}")
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise ValueError(f"{key}= needs the package transformers\n  pip install silotrain[text]") from error
    try:
        if path.is_file():
            backend: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            backend = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of whatever kind the package raises for a file of another format
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{key}={path} cannot be read: {reason}\n  valid: {valid}") from error
    if not backend.is_fast:
        raise ValueError(
            f"{key}={path} has no tokenizer.json, by which positions in a text are known.\n"
            "  save it again by transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"
        )
    return Tokenizer(path, backend)
