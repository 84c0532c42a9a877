"""A file of tokens and its description, a JSON file beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

Dtype = Literal["uint16", "uint32"]


@dataclass(frozen=True)
class TokenFileInfo:
    """The description of a file of tokens, FILE.json beside FILE.

    Attributes:
        dtype: of the numbers, which are little-endian.
        tokens: how many the file has.
        vocabulary: tokens are below it.
        documents: how many texts it was made of.
        bytes: of the texts, in UTF-8.
        end: the token after each document; None: there is none.
        tokenizer: the fingerprint of its vocabulary.
    """

    dtype: Dtype
    tokens: int
    vocabulary: int
    documents: int
    bytes: int
    end: int | None
    tokenizer: str

    def to_json(self) -> str:
        """Return the content of the file that describes."""
        return json.dumps(asdict(self), indent=1) + "\n"


def description_path(path: Path) -> Path:
    """Return the path of the description of a file of tokens."""
    return path.with_name(f"{path.name}.json")


def read_description(path: Path) -> TokenFileInfo | None:
    """Read the description of a file of tokens; None if it has none.

    Raises:
        ValueError: the description is damaged.
    """
    described = description_path(path)
    if not described.exists():
        return None
    try:
        stored = json.loads(described.read_text())
        info = TokenFileInfo(**{field.name: stored[field.name] for field in fields(TokenFileInfo)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{described} does not describe a file of tokens: {type(error).__name__}: {error}\n"
            "  restore it, or remove it, and set data.dtype="
        ) from error
    if info.dtype not in ("uint16", "uint32"):
        raise ValueError(f"{described}: dtype={info.dtype}\n  valid: uint16, uint32")
    return info
