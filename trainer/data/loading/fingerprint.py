"""Checksums of a data set, so that a run is not resumed with examples that have changed."""

from __future__ import annotations

import zlib

import numpy as np

from trainer.data.partition.clients import Clients
from trainer.data.sources.base import DataSplits, Fingerprintable, Source


def fingerprint(data: DataSplits, clients: Clients) -> str:
    """Return a checksum of the examples and of their assignment to clients, equal on all ranks.

    It covers all bytes of sources in memory, at 3 GB a second, and a sample of larger ones. Of sources that are not
    `Fingerprintable`, which may draw examples anew at each fetch, it covers the number, the labels and the client ids.
    """
    crc = checksum(data)
    for ids in (*clients.train, *clients.validation, *clients.test):
        # With per-client files ids differ between ranks, and the assignment follows from the numbers of examples.
        crc = _add(ids if clients.homes is None else np.array(len(ids)), crc)
    return f"{crc:08x}"


def checksum(data: DataSplits) -> int:
    """Return the checksum of the examples alone."""
    crc = 0
    for source in data.parts.values():
        for column in _columns(source):
            crc = _add(column, crc)
    return crc if data.weights is None else _add(data.weights, crc)


def _columns(source: Source) -> list[np.ndarray]:
    columns = source.fingerprint_data() if isinstance(source, Fingerprintable) else [np.array(len(source))]
    return [*columns, *(column for column in (source.labels, source.client_ids) if column is not None)]


def _add(column: np.ndarray, crc: int) -> int:
    header = f"{column.dtype} {column.shape}".encode()
    return zlib.crc32(np.ascontiguousarray(column).data.cast("B") if column.size else b"", zlib.crc32(header, crc))
