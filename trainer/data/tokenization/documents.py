"""Documents of a corpus: texts and JSON lines, compressed by gzip or not, of which a piece is in memory at a time."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

PIECE = 1 << 18  # characters of a text that are read together
JSON_LINES = (".jsonl", ".ndjson", ".json")


class DocumentFile:
    """A file of documents: a text is one document; JSON lines have one in a field of each line.

    Args:
        path: JSON lines if its name ends with .jsonl, .ndjson or .json, and compressed if it ends with .gz after that.
        field: the field of the text.

    Raises:
        ValueError: there is no such file. Iterating raises it for a line, or for bytes, that cannot be read.
    """

    def __init__(self, path: Path, field: str) -> None:
        self.path, self.field = path, field
        self.is_json = (path.with_suffix("") if path.suffix == ".gz" else path).suffix in JSON_LINES
        self._raw: BinaryIO | None = None
        with _naming(path):
            self.size = path.stat().st_size

    @property
    def position(self) -> int:
        """The number of bytes of the file that have been read."""
        return self._raw.tell() if self._raw else 0

    def __iter__(self) -> Iterator[Iterator[str]]:
        """Yield the pieces of each document."""
        with _naming(self.path), self.path.open("rb") as self._raw:
            file: Any = gzip.GzipFile(fileobj=self._raw) if self.path.suffix == ".gz" else self._raw
            yield from self._json_lines(file) if self.is_json else self._text(file)
        self._raw = None

    def _text(self, file: BinaryIO) -> Iterator[Iterator[str]]:
        with io.TextIOWrapper(file, "utf-8", newline="") as text:  # newlines as they are
            yield self._pieces(text)

    def _pieces(self, text: TextIO) -> Iterator[str]:
        with _naming(self.path):  # the reader's errors come up where the pieces are asked for
            yield from iter(lambda: text.read(PIECE), "")

    def _json_lines(self, file: BinaryIO) -> Iterator[Iterator[str]]:
        for number, example in parse_lines(file, self.path):
            text = self._field_of(example, number)
            yield (text[start : start + PIECE] for start in range(0, len(text), PIECE))

    def _field_of(self, example: dict[str, Any], number: int) -> str:
        text = example.get(self.field)
        if isinstance(text, str):
            return text
        problem = f"its {self.field} is no text" if self.field in example else f"it has no field {self.field}"
        raise ValueError(f"{self.path}, line {number}: {problem}\n  its fields: {', '.join(example)}; set field=")


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects of a file of JSON lines, compressed if its name ends with .gz, with their line numbers.

    Raises:
        ValueError: the file cannot be read, or a line is no JSON object.
    """
    with _naming(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return list(parse_lines(file, path))


def parse_lines(file: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line of JSON that is not empty; raise ValueError for a bad one."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise ValueError(f"{path}, line {number} is no JSON object\n  valid: one object per line")
        yield number, parsed


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise the errors of a file as ValueErrors that name it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: 0x{error.object[error.start]:02x} ({error.reason})\n"
            "  convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
