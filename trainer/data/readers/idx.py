"""Reader of IDX files, the format of MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import numpy as np

from trainer.data.readers.limits import check_unpacked_size

GZIP_MAGIC = b"\x1f\x8b"
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> np.ndarray:
    """Read the array of an IDX file, plain or gzipped, in native byte order.

    The format is two zero bytes, a byte for the type, a byte for the number of dimensions, each dimension as a
    big-endian uint32, then the numbers, big-endian, last dimension fastest. Gzip is recognized by content, not by name.
    The array is read-only where it needs no conversion.

    Raises:
        ValueError: the file cannot be read, is not IDX, is cut short, has trailing bytes, or is larger than memory.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            dtype, shape, start = _parse_header(path, file)
            size = math.prod(shape) * dtype.itemsize
            check_unpacked_size(str(path), size)
            content = file.read(size + 1)  # not all: a gzipped file may unpack to a thousand times its size
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}. Fetch it again") from error
    if len(content) != size:
        is_short = len(content) < size
        found = f"{start + len(content)}{'' if is_short else ' or more'}"
        raise ValueError(
            f"{path}: an IDX array of shape {list(shape)} takes {start + size} bytes, the file has {found}: "
            f"it is {'cut short' if is_short else 'followed by trailing bytes'}. Fetch it again"
        )
    values = np.frombuffer(content, dtype).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    """Open the file, unpacked if it is gzipped."""
    with path.open("rb") as file:
        if not file.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC):
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked


def _parse_header(path: Path, file: BufferedReader | gzip.GzipFile) -> tuple[np.dtype, tuple[int, ...], int]:
    """Return the dtype, the shape, and the size of the header."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES:
        raise ValueError(f"{path}: not an IDX file: it starts with the bytes '{magic.hex(' ')}'")
    dimensions = magic[3]
    sizes = file.read(4 * dimensions)
    start = 4 + len(sizes)
    if dimensions == 0 or len(sizes) < 4 * dimensions:
        raise ValueError(f"{path}: a header of {dimensions} dimensions in an IDX file of {start} bytes")
    return np.dtype(IDX_TYPES[magic[2]]), tuple(np.frombuffer(sizes, ">u4").tolist()), start
