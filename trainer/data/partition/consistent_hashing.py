"""A partition that a client may join or leave: consistent hashing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.data.partition.clients import Clients
from trainer.data.partition.errors import column_errors, raise_errors, size_errors, smallest_errors
from trainer.data.sources.base import Source
from trainer.utils.seeding import derive_seed


@dataclass(frozen=True)
class Hash:
    """Examples and clients lie on a ring by hashes of their keys; an example is of the next client on the ring.

    A client lies there with `points` virtual nodes, so that clients are of about one size: the sizes' deviation is
    their mean over the square root of the points. When a client joins, examples move to it and to nobody else; when the
    last one leaves, its examples alone move. Karger et al. 1997, Consistent hashing and random trees.

    key  `example`: its number in the source; `owner`: all examples of an owner go to one client
    """

    key: Literal["example", "owner"] = "example"
    points: int = 256
    min_examples: int = 1

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        errors = size_errors("hash", train, clients, self.min_examples)
        if self.key not in ("example", "owner"):
            errors.append(f"partition.key={self.key}\n  valid: example or owner")
        if self.key == "owner":
            errors += column_errors("hash", "client_ids", train, test)
        if self.points < 1:
            errors.append(f"partition.points={self.points}\n  valid: a whole number from 1")
        raise_errors(errors)
        ring = np.concatenate(
            [hash_keys(np.arange(self.points), derive_seed(seed, "client", c)) for c in range(clients)]
        )
        order = ring.argsort(kind="stable")
        ring, client_of = ring[order], np.repeat(np.arange(clients), self.points)[order]

        def dealt(source: Source, part: str) -> np.ndarray:
            keys = source.client_ids if self.key == "owner" else np.arange(len(source))
            assert keys is not None
            salt = derive_seed(seed, "owner") if self.key == "owner" else derive_seed(seed, "example", part)
            return client_of[np.searchsorted(ring, hash_keys(keys, salt)) % len(ring)]

        split = Clients.of(dealt(train, "train"), dealt(test, "test"), clients)
        raise_errors(smallest_errors("hash", split, self.min_examples, "set fewer clients=, or more partition.points="))
        return split


def hash_keys(keys: np.ndarray, salt: int) -> np.ndarray:
    """uint64 [n], by the finaliser of SplitMix64 (Steele, Lea and Flood 2014), which is one to one for each salt."""
    mixed = (keys.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
