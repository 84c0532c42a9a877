"""What tells a data set from another, so that a run does not go on with examples that have changed."""

from __future__ import annotations

import zlib

import numpy as np

from trainer.data.partition.clients import Clients
from trainer.data.sources.base import DataSplits, Fingerprintable, Source


def fingerprint(data: DataSplits, clients: Clients) -> str:
    """A checksum of the examples and of which client owns which.

    All bytes of sources in memory, 3 GB a second; of larger ones what they give as evidence; of others, whose examples
    may be drawn anew each time they are asked for, their number, labels and owners.
    """
    crc = checksum(data)
    for ids in (*clients.train, *clients.validation, *clients.test):
        # Where clients have homes, ids are not the same on all ranks, and who owns what needs no telling.
        crc = _add(ids if clients.homes is None else np.array(len(ids)), crc)
    return f"{crc:08x}"


def checksum(data: DataSplits) -> int:
    """The part of the fingerprint that is of the examples."""
    crc = 0
    for source in (data.train, data.test):
        for column in _columns(source):
            crc = _add(column, crc)
    return crc if data.weights is None else _add(data.weights, crc)


def _columns(source: Source) -> list[np.ndarray]:
    evidence = source.fingerprint_data() if isinstance(source, Fingerprintable) else [np.array(len(source))]
    return [*evidence, *(column for column in (source.labels, source.client_ids) if column is not None)]


def _add(column: np.ndarray, crc: int) -> int:
    described = f"{column.dtype} {column.shape}".encode()
    return zlib.crc32(np.ascontiguousarray(column).data.cast("B") if column.size else b"", zlib.crc32(described, crc))
