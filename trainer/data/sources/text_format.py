"""How text and the tokens of a data set become each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TextFormat:
    """The text of a data set of tokens, by which a language model is given prompts and measured per byte.

    Attributes:
        encode: returns the tokens of a prompt.
        decode: returns the text of tokens.
        length: most tokens that a model sees at once.
        end: tokens that end a text.
        token_bytes: bytes of each token, int64 [vocabulary]; None if they are not known.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    length: int
    end: frozenset[int] = frozenset()
    token_bytes: np.ndarray | None = None


def byte_format(length: int) -> TextFormat:
    """Return the format of texts whose tokens are their bytes in UTF-8."""

    def decode(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    return TextFormat(lambda text: list(text.encode()), decode, length, token_bytes=np.ones(256, np.int64))
