"""The examples of every client, as ids into the training and test sources."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trainer.data.sources.base import Source
from trainer.utils.seeding import numpy_generator

MAX_LABEL_COLUMNS = 20


@dataclass(frozen=True)
class Clients:
    """The examples of every client: sorted int64 ids, one array per client.

    Attributes:
        train: ids of the training source.
        validation: ids of the training source, disjoint from `train`.
        test: ids of the test source.
        homes: silo of every client, where each client brings its own files; None for pooled data.
    """

    train: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    homes: tuple[int, ...] | None = None

    @staticmethod
    def of(train_clients: np.ndarray, test_clients: np.ndarray, clients: int) -> Clients:
        """Make clients without validation examples from the client of every training and test example."""
        none = tuple(np.empty(0, np.int64) for _ in range(clients))
        return Clients(_ids_by_client(train_clients, clients), none, _ids_by_client(test_clients, clients))

    def __len__(self) -> int:
        return len(self.train)

    @property
    def sizes(self) -> np.ndarray:
        """Number of training examples of every client, int64 [clients]."""
        return np.array([len(ids) for ids in self.train], np.int64)

    def split_validation(self, fraction: float, seed: int) -> Clients:
        """Move `fraction` of each client's training examples (rounded down) to its validation examples.

        A client keeps at least one training example.

        Raises:
            ValueError: the fraction is outside [0, 1).
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"data.validation={fraction}: a fraction of the training examples, from 0 to below 1")
        train, moved = zip(
            *(_split_validation(ids, fraction, seed, client) for client, ids in enumerate(self.train)), strict=True
        )
        validation = tuple(np.sort(np.concatenate(pair)) for pair in zip(self.validation, moved, strict=True))
        return replace(self, train=train, validation=validation)


def describe(clients: Clients, train: Source, label_names: tuple[str, ...] = (), most: int = 20) -> str:
    """Format a table for the console, one row per client.

    The columns are the numbers of examples and, of up to 20 classes, of training labels. Only the first `most` clients
    are shown. A last line counts the rest.
    """
    labels, names = label_columns(train, label_names)
    rows = [["client", "train", "validation", "test", *names]]
    for client in range(min(most, len(clients))):
        parts = (clients.train[client], clients.validation[client], clients.test[client])
        counts = np.bincount(labels[parts[0]], minlength=len(names)) if names else []
        rows.append([str(number) for number in (client, *map(len, parts), *counts)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(clients) > most:
        lines.append(f"... and {len(clients) - most} more")
    return "\n".join(lines)


def _ids_by_client(client_of: np.ndarray, clients: int) -> tuple[np.ndarray, ...]:
    ids = np.argsort(client_of, kind="stable")
    ends = np.cumsum(np.bincount(client_of, minlength=clients))
    return tuple(np.split(ids, ends[:-1]))


def _split_validation(ids: np.ndarray, fraction: float, seed: int, client: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the training and the validation ids."""
    count = min(int(fraction * len(ids)), max(len(ids) - 1, 0))
    is_moved = np.zeros(len(ids), bool)
    is_moved[numpy_generator(seed, "hold out", client).permutation(len(ids))[:count]] = True
    return ids[~is_moved], ids[is_moved]


def label_columns(train: Source, label_names: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    """Return labels numbered from 0 and the names of their columns; no names for no or too many labels."""
    if train.labels is None:
        return np.empty(0, np.int64), []
    values, labels = np.unique(train.labels, return_inverse=True)
    if len(values) > MAX_LABEL_COLUMNS:
        return labels, []
    return labels, [label_names[value] if 0 <= value < len(label_names) else str(value) for value in values]
