"""The examples of every client, as ids into the training and test sources."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trainer.data.sources.base import Source
from trainer.utils.seeding import numpy_generator

MAX_LABEL_COLUMNS = 20
NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Clients:
    """The examples of every client: sorted int64 ids, one array per client.

    Attributes:
        train: ids of the training source.
        validation: ids of the validation source; where that is the training source, disjoint from `train`.
        test: ids of the test source.
        homes: silo of every client, where each client brings its own files; None for pooled data.
    """

    train: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    homes: tuple[int, ...] | None = None

    @staticmethod
    def of(
        train_clients: np.ndarray, test_clients: np.ndarray, clients: int, validation_clients: np.ndarray = NONE
    ) -> Clients:
        """Make clients from the client of every training, test and perhaps validation example."""
        parts = (train_clients, validation_clients, test_clients)
        train, validation, test = (_ids_by_client(client_of, clients) for client_of in parts)
        return Clients(train, validation, test)

    def __len__(self) -> int:
        return len(self.train)

    @property
    def sizes(self) -> np.ndarray:
        """Number of training examples of every client, int64 [clients]."""
        return np.array([len(ids) for ids in self.train], np.int64)

    def split_validation(self, part: float, seed: int) -> Clients:
        """Move a part of the training examples to the validation examples.

        A client keeps at least one training example.

        Args:
            part: below 1 the fraction of each client's examples (rounded down); from 2 the number of examples of all
                clients together, divided in proportion to their sizes.
            seed: seed of the run.

        Raises:
            ValueError: it is neither, or there are fewer examples.
        """
        total = int(self.sizes.sum())
        if not 0 <= part < 1 and not 2 <= part < total:
            raise ValueError(
                f"data.validation={part}: a fraction of the training examples, from 0 to below 1, or their number, "
                f"from 2 to below {total}"
            )
        counts = (self.sizes * part).astype(np.int64) if part < 1 else _proportional_counts(self.sizes, int(part))
        counts = np.minimum(counts, np.maximum(self.sizes - 1, 0))
        held_out = zip(self.train, counts.tolist(), strict=True)
        train, moved = zip(
            *(_split_validation(ids, count, seed, client) for client, (ids, count) in enumerate(held_out)), strict=True
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


def _proportional_counts(sizes: np.ndarray, count: int) -> np.ndarray:
    """Divide `count` examples in proportion to the sizes; every share is less than 1 away from the exact one."""
    return np.diff(sizes.cumsum() * count // sizes.sum(), prepend=0)


def _split_validation(ids: np.ndarray, count: int, seed: int, client: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the training and the validation ids."""
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
