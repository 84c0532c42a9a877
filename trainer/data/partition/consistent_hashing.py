"""A partition that a client may join or leave: consistent hashing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.data.partition.clients import Clients
from trainer.data.partition.errors import column_faults, refuse, size_faults, smallest_faults
from trainer.data.sources.base import Source
from trainer.utils.seeding import derive


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
        faults = size_faults("hash", train, clients, self.min_examples)
        if self.key not in ("example", "owner"):
            faults.append(f"partition.key={self.key}\n  valid: example or owner")
        if self.key == "owner":
            faults += column_faults("hash", "owners", train, test)
        if self.points < 1:
            faults.append(f"partition.points={self.points}\n  valid: a whole number from 1")
        refuse(faults)
        ring = np.concatenate([hashed(np.arange(self.points), derive(seed, "client", c)) for c in range(clients)])
        order = ring.argsort(kind="stable")
        ring, client_of = ring[order], np.repeat(np.arange(clients), self.points)[order]

        def dealt(source: Source, part: str) -> np.ndarray:
            keys = source.owners if self.key == "owner" else np.arange(len(source))
            assert keys is not None
            salt = derive(seed, "owner") if self.key == "owner" else derive(seed, "example", part)
            return client_of[np.searchsorted(ring, hashed(keys, salt)) % len(ring)]

        split = Clients.of(dealt(train, "train"), dealt(test, "test"), clients)
        refuse(smallest_faults("hash", split, self.min_examples, "set fewer clients=, or more partition.points="))
        return split


def hashed(keys: np.ndarray, salt: int) -> np.ndarray:
    """uint64 [n], by the finaliser of SplitMix64 (Steele, Lea and Flood 2014), which is one to one for each salt."""
    mixed = (keys.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
