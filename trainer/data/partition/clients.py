"""Which examples belong to which client, as ids into the train and test sources."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trainer.data.sources.base import Source
from trainer.utils.seeding import numpy_generator

MAX_LABEL_COLUMNS = 20


@dataclass(frozen=True)
class Clients:
    """The examples of every client: sorted int64 ids, one array a client.

    `train` and `validation` are ids of the train source and disjoint; `test` are ids of the test source. `homes` are
    the silos of the clients, where their examples are nowhere else.
    """

    train: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    homes: tuple[int, ...] | None = None

    @staticmethod
    def of(train_clients: np.ndarray, test_clients: np.ndarray, clients: int) -> Clients:
        """Clients without validation examples, from the client of every train and of every test example."""
        none = tuple(np.empty(0, np.int64) for _ in range(clients))
        return Clients(_ids_by_client(train_clients, clients), none, _ids_by_client(test_clients, clients))

    def __len__(self) -> int:
        return len(self.train)

    @property
    def sizes(self) -> np.ndarray:
        """Training examples of every client, int64 [clients]."""
        return np.array([len(ids) for ids in self.train], np.int64)

    def split_validation(self, fraction: float, seed: int) -> Clients:
        """These clients with `fraction` of each one's training examples (rounded down) moved to its validation.

        A client keeps at least one training example. Raises ValueError for a fraction outside [0, 1).
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"data.validation={fraction}: a fraction of the training examples, from 0 to below 1")
        kept, held = zip(
            *(_split_validation(ids, fraction, seed, client) for client, ids in enumerate(self.train)), strict=True
        )
        both = tuple(np.sort(np.concatenate(pair)) for pair in zip(self.validation, held, strict=True))
        return replace(self, train=kept, validation=both)


def describe(clients: Clients, train: Source, label_names: tuple[str, ...] = (), most: int = 20) -> str:
    """A table for the console: a row a client with its examples and, of up to 20 classes, its training labels.

    Only the first `most` clients are shown; a last line counts the rest.
    """
    labels, names = _label_columns(train, label_names)
    rows = [["client", "train", "validation", "test", *names]]
    for client in range(min(most, len(clients))):
        parts = (clients.train[client], clients.validation[client], clients.test[client])
        found = np.bincount(labels[parts[0]], minlength=len(names)) if names else []
        rows.append([str(number) for number in (client, *map(len, parts), *found)])
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
    """The ids that stay, and those held out."""
    count = min(int(fraction * len(ids)), max(len(ids) - 1, 0))
    held = np.zeros(len(ids), bool)
    held[numpy_generator(seed, "hold out", client).permutation(len(ids))[:count]] = True
    return ids[~held], ids[held]


def _label_columns(train: Source, label_names: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    """The label of every example counted from 0, and the names of the columns: none for no or too many labels."""
    if train.labels is None:
        return np.empty(0, np.int64), []
    values, labels = np.unique(train.labels, return_inverse=True)
    if len(values) > MAX_LABEL_COLUMNS:
        return labels, []
    return labels, [label_names[value] if 0 <= value < len(label_names) else str(value) for value in values]
