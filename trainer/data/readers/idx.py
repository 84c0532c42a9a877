"""Reader of IDX files, the format of MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

GZIP_MAGIC = b"\x1f\x8b"
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> np.ndarray:
    """Read the array of an IDX file, plain or gzipped, in native byte order.

    The format is two zero bytes, a byte for the type, a byte for the number of dimensions, each dimension as a
    big-endian uint32, then the numbers, big-endian, last dimension fastest. Gzip is recognized by content, not by name.
    The array is read-only where it needs no conversion.

    Raises:
        ValueError: the file cannot be read, is not IDX, is cut short, or has trailing bytes.
    """
    path = Path(path)
    content = _read_bytes(path)
    dtype, shape, start = _parse_header(path, content)
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        problem = "cut short" if len(content) < expected else "followed by trailing bytes"
        raise ValueError(
            f"{path}: an IDX array of shape {list(shape)} takes {expected} bytes, the file has {len(content)}: "
            f"it is {problem}. Fetch it again"
        )
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}. Fetch it again") from error


def _parse_header(path: Path, content: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """Return the dtype, the shape, and the offset of the first number."""
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise ValueError(f"{path}: not an IDX file: it starts with the bytes '{content[:4].hex(' ')}'")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    if dimensions == 0 or len(content) < start:
        raise ValueError(f"{path}: a header of {dimensions} dimensions in an IDX file of {len(content)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    return np.dtype(IDX_TYPES[content[2]]), shape, start
