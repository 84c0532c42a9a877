"""Examples that lie apart: each client's in a source of its own, of which a rank has those of its silo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.data.partition.clients import Clients
from trainer.data.partition.partition import Iid, Natural, Partition
from trainer.data.sources.base import DataSplits, Source
from trainer.data.sources.iterable import IterableSource


class PerClientSource:
    """The sources of all clients as one Source, from which this rank can fetch those that are `local`.

    `sizes` are the numbers of examples and `checksums` tell the contents, by client; they are equal on all ranks, and
    so is `homes`, the silo of each client. Ids are not: they number the examples that are here first, because who only
    wants to see some examples asks for the first ones.
    """

    client_ids: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __init__(
        self, sizes: Sequence[int], local: Mapping[int, Source], homes: Sequence[int], checksums: Sequence[int]
    ) -> None:
        self.local, self.homes, self.checksums = local, tuple(homes), checksums
        order = [*local, *(client for client in range(len(sizes)) if client not in local)]
        self.clients = torch.tensor(order)
        self.ends = torch.tensor([sizes[client] for client in order]).cumsum(0)
        self.starts = dict(zip(order, [0, *self.ends[:-1].tolist()], strict=True))
        self.sizes = sizes
        firsts = np.cumsum([0, *sizes[:-1]])  # of the clients' examples, were all files one after the other
        self.offsets = torch.tensor([int(firsts[client]) - self.starts[client] for client in order])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def ids(self, client: int) -> np.ndarray:
        """The ids of a client's examples, ascending."""
        return self.starts[client] + np.arange(self.sizes[client])

    def global_positions(self, ids: Tensor) -> Tensor:
        """The places of these examples in all files, one after the other: the same on all ranks, as ids are not."""
        return ids + self.offsets[torch.searchsorted(self.ends, ids, right=True)]

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        clients = self.clients[torch.searchsorted(self.ends, ids, right=True)]
        there = clients.unique().tolist() or [next(iter(self.local))]
        if len(there) == 1:
            return self._fetch_from(there[0], ids)
        rows = [(clients == client).nonzero().flatten() for client in there]
        parts = [self._fetch_from(client, ids[row]) for client, row in zip(there, rows, strict=True)]
        back = torch.cat(rows).argsort()
        inputs, targets = (torch.cat(column)[back] for column in zip(*parts, strict=True))
        return inputs, targets

    def fingerprint_data(self) -> list[np.ndarray]:
        return [np.array(self.checksums), np.array(self.sizes)]

    def _fetch_from(self, client: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        assert client in self.local, f"the examples of client {client} are in silo {self.homes[client]}"
        return self.local[client].fetch(ids - self.starts[client])


def is_sequential(source: Source) -> bool:
    """Whether examples can only be read one after the other, and are trained on in that order."""
    parts = source.local.values() if isinstance(source, PerClientSource) else [source]
    return any(isinstance(part, IterableSource) for part in parts)


def per_client_partition(data: DataSplits, partition: Partition, num_clients: int | None = None) -> Clients:
    """The clients whose examples lie apart, each with its own. ValueError where they are to be dealt otherwise."""
    train, test = data.train, data.test
    assert isinstance(train, PerClientSource) and isinstance(test, PerClientSource)
    count = len(train.homes)
    if num_clients not in (None, count):
        raise ValueError(
            f"clients={num_clients}, and there are {count} data.files: each of them is a client.\n"
            f"  set clients={count}, or leave it out"
        )
    if not isinstance(partition, Iid | Natural):
        raise ValueError(
            f"partition={type(partition).__name__.lower()} with data.files: each file is a client, none is dealt.\n"
            "  leave partition= out, or put all examples in one file"
        )
    none = tuple(np.empty(0, np.int64) for _ in range(count))
    return Clients(tuple(map(train.ids, range(count))), none, tuple(map(test.ids, range(count))), train.homes)
