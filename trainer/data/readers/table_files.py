"""The files of a table, and their text: unpacked, in UTF-8, no larger than the memory."""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unicodedata import normalize

from trainer.data.readers.limits import check_room

GZIP = b"\x1f\x8b"
UTF_8_MARK = b"\xef\xbb\xbf"
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
CHECKED_BYTES = 64 << 20  # unpacked between two looks at the free memory
MAX_FIELD = 1 << 30  # characters; the standard library's own limit is too short for an article


def find_files(path: Path) -> list[Path]:
    """Return the files of a table, sorted: one file, those in a folder, or those that match a pattern such as a/*.csv.

    Names that begin with a dot or an underscore are none of the user's: Spark and Hive leave such marks and checksums.

    Raises:
        ValueError: there is none.
    """
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(path))]
    elif path.exists() or not glob.has_magic(str(path)):
        return [path]
    else:
        matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
        found = [file for file in matches if file.is_file() and not _is_hidden(Path(file.name))]
    if not found:
        raise ValueError(f"there are no files in {path.absolute()}")
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


@contextmanager
def open_utf8(path: Path, arrow: Any) -> Iterator[io.BufferedReader]:
    """Open a text file, which may be compressed and in UTF-8, UTF-16 or UTF-32, as UTF-8 without a byte-order mark.

    Raises:
        ValueError: it is in another encoding, or while it is read, the memory is full.
    """
    with path.open("rb") as file:
        compression = "gzip" if file.read(2) == GZIP else "detect"  # by content, or by name
    with arrow.input_stream(str(path), compression=compression) as stream:
        head = stream.read(4)
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    if encoding is None and b"\0" in head:
        raise ValueError(f"{path.name}: it has zero bytes, as UTF-16 has without a byte-order mark. Save it as UTF-8")
    with arrow.input_stream(str(path), compression=compression) as stream:
        if encoding:
            stream = arrow.transcoding_input_stream(stream, encoding, "utf-8")
        elif head.startswith(UTF_8_MARK):
            stream.read(len(UTF_8_MARK))
        yield io.BufferedReader(_Unpacked(stream, path.name))


class _Unpacked(io.RawIOBase):
    """Bytes of a stream, which stops when they fill the memory: a small file may unpack to any size."""

    def __init__(self, stream: Any, name: str):
        self.stream, self.name_in_errors, self.unchecked = stream, name, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.stream.read(len(buffer))
        self.unchecked += len(content)
        if self.unchecked > CHECKED_BYTES:
            self.unchecked = 0
            check_room(self.name_in_errors)
        buffer[: len(content)] = content
        return len(content)


def column_names(path: Path, arrow: Any) -> list[str]:
    """Return the names in the first line of a CSV file, as they are written there.

    Raises:
        ValueError: they are not UTF-8, or two are equal in the composed form of Unicode.
    """
    with open_utf8(path, arrow) as file, _naming_encoding(path):
        try:
            names = next(csv.reader(io.TextIOWrapper(file, "utf-8", newline="")), [])
        except csv.Error as error:
            raise ValueError(f"{path.name}: its first line cannot be read: {error}") from error
    check_names(names)
    return names


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError if two names of columns are equal in the composed form of Unicode."""
    composed = [normalize("NFC", name) for name in names]
    if repeated := sorted({name for name in composed if composed.count(name) > 1}):
        raise ValueError(f"several columns are called {', '.join(repeated)}. Rename all but one")


@contextmanager
def _naming_encoding(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(encoding_error(path)) from error


def encoding_error(path: Path) -> str:
    """Return the error for a text file of an unknown encoding."""
    return f"{path.name}: not UTF-8. Convert it, for example with iconv -f latin1 -t utf-8"


def csv_line(path: Path, arrow: Any, column: int, value: str) -> int:
    """Return the number of the first line whose cell in this column is this text, from 1; 0 for none."""
    limit = csv.field_size_limit(MAX_FIELD)
    try:
        with open_utf8(path, arrow) as file:
            rows = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""))
            next(rows, None)
            for row in rows:
                if len(row) > column and row[column].strip() == value.strip():
                    return rows.line_num
    finally:
        csv.field_size_limit(limit)
    return 0


def json_line(path: Path, arrow: Any, field: str, wants_number: bool | None = None) -> tuple[int, Any]:
    """Return the number of the first line, from 1, whose field is no number, and its value; 0 and None for none.

    Args:
        path: the file.
        arrow: the package pyarrow.
        field: the name of the field. Null is of any kind.
        wants_number: False finds the first number instead; None finds what is not of the kind of the first value.
    """
    with open_utf8(path, arrow) as file:
        for number, line in enumerate(file, 1):
            value = json.loads(line).get(field) if line.strip() else None
            if value is None:
                continue
            is_number = isinstance(value, int | float)
            wants_number = is_number if wants_number is None else wants_number
            if is_number != wants_number:
                return number, value
    return 0, None
