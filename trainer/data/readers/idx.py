"""Reader of IDX files, the format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

GZIP_MAGIC = b"\x1f\x8b"
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file, plain or gzipped (told by its content, not by its name), in native byte order.

    The format: two zero bytes, a byte for the type, a byte for the number of dimensions, each dimension as a big-endian
    uint32, then the numbers, big-endian, last dimension fastest. The array is read-only where it needed no conversion.

    Raises ValueError naming the file when it cannot be read, is not IDX, is cut short, or goes on after its end.
    """
    path = Path(path)
    content = _content(path)
    dtype, shape, start = _header(path, content)
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        fault = "cut short" if len(content) < expected else "followed by bytes that do not belong to it"
        raise ValueError(
            f"{path}: an IDX array of shape {list(shape)} takes {expected} bytes, the file has {len(content)}: "
            f"it is {fault}. Fetch it again"
        )
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}. Fetch it again") from error


def _header(path: Path, content: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """The type, the shape, and where the numbers start."""
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise ValueError(f"{path}: not an IDX file: it starts with the bytes '{content[:4].hex(' ')}'")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    if dimensions == 0 or len(content) < start:
        raise ValueError(f"{path}: a header of {dimensions} dimensions in an IDX file of {len(content)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    return np.dtype(IDX_TYPES[content[2]]), shape, start
