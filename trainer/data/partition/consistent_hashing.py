"""Partition by consistent hashing, which clients can join and leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.data.partition.base import column_errors, size_errors, smallest_errors
from trainer.data.partition.clients import Clients
from trainer.data.sources.base import Source
from trainer.utils.errors import raise_errors
from trainer.utils.seeding import derive_seed, hash_numbers


@dataclass(frozen=True)
class Hash:
    """Hash examples and clients to a ring; an example belongs to the next client on the ring.

    A client has `points` virtual nodes, which makes sizes similar: their standard deviation is their mean over the
    square root of the points. When a client joins, it takes examples and no others move. When the last client leaves,
    only its examples move. Karger et al. 1997, Consistent hashing and random trees.

    Attributes:
        key: `example` hashes the number of the example in its source; `client_id` hashes its natural client, whose
            examples all go to one client.
        points: virtual nodes per client.
        min_examples: fewest training examples a client may have.
    """

    key: Literal["example", "client_id"] = "example"
    points: int = 256
    min_examples: int = 1

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        errors = size_errors("hash", train, clients, self.min_examples)
        if self.key not in ("example", "client_id"):
            errors.append(f"partition.key={self.key}\n  valid: example or client_id")
        if self.key == "client_id":
            errors += column_errors("hash", "client_ids", train, test)
        if self.points < 1:
            errors.append(f"partition.points={self.points}\n  valid: a whole number from 1")
        raise_errors(errors)
        ring = np.concatenate(
            [hash_numbers(np.arange(self.points), derive_seed(seed, "client", c)) for c in range(clients)]
        )
        order = ring.argsort(kind="stable")
        ring, client_of_node = ring[order], np.repeat(np.arange(clients), self.points)[order]

        def assign(source: Source, part: str) -> np.ndarray:
            keys = source.client_ids if self.key == "client_id" else np.arange(len(source))
            assert keys is not None
            salt = derive_seed(seed, "owner") if self.key == "client_id" else derive_seed(seed, "example", part)
            return client_of_node[np.searchsorted(ring, hash_numbers(keys, salt)) % len(ring)]

        split = Clients.of(assign(train, "train"), assign(test, "test"), clients)
        raise_errors(smallest_errors("hash", split, self.min_examples, "set fewer clients=, or more partition.points="))
        return split
