"""Clients that bring a source each, of which a rank holds those of its silo."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.data.sources.base import Source, fetch_seeded
from trainer.data.sources.padding import Padding
from trainer.data.sources.torch_datasets import is_read_by_batch, is_sequential
from trainer.utils.tensor_trees import Tree, concatenate, take

ANY = "any"  # the size of a dimension in which examples are padded


class MadeUpSource:
    """Examples of zeros, for a rank that has none of its own.

    Args:
        inputs: dtype and shape of an example's inputs, as `DatasetInfo` describes them.
        targets: those of its targets.

    Attributes:
        padding: of tensors of any length; None if there are none.
    """

    def __init__(self, inputs: str, targets: str) -> None:
        self.inputs, self.targets = inputs, targets
        padded = dict.fromkeys((name for name, _, sizes in _described(inputs) if ANY in sizes), 0.0)
        self.padding = Padding(padded, 0.0 if ANY in targets else None, mask=None) if padded else None

    def fetch(self, ids: Tensor) -> tuple[Tree, Tree]:
        """Return as many examples as there are ids."""
        return _zeros(self.inputs, len(ids)), _zeros(self.targets, len(ids))


class PerClientSource:
    """The sources of all clients as one Source, from which this rank can fetch the local ones.

    Ids differ between ranks: each rank numbers its local examples first, so that ids 0 and up can be fetched anywhere.

    Args:
        sizes: number of examples of every client; equal on all ranks.
        local: sources of the clients of this rank's silo, by client.
        homes: silo of every client; equal on all ranks.
        checksums: checksum of every client's data; equal on all ranks.
        made_up: has examples for a rank whose silo has no client, from which it learns their shapes.
    """

    client_ids: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __init__(
        self,
        sizes: Sequence[int],
        local: Mapping[int, Source],
        homes: Sequence[int],
        checksums: Sequence[int],
        made_up: MadeUpSource | None = None,
    ) -> None:
        self.made_up = made_up
        self.local, self.homes, self.checksums, self.sizes = local, tuple(homes), checksums, sizes
        order = [*local, *(client for client in range(len(sizes)) if client not in local)]
        self.clients = torch.tensor(order)
        self.ends = torch.tensor([sizes[client] for client in order]).cumsum(0)
        self.starts = dict(zip(order, [0, *self.ends[:-1].tolist()], strict=True))
        global_starts = np.cumsum([0, *sizes[:-1]])
        self.offsets = torch.tensor([int(global_starts[client]) - self.starts[client] for client in order])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def is_sequential(self) -> bool:
        return any(map(is_sequential, self.local.values()))

    @property
    def is_read_by_batch(self) -> bool:
        return any(map(is_read_by_batch, self.local.values()))

    @property
    def padding(self) -> Padding | None:
        sources = [self.made_up] if self.made_up else self.local.values()
        return next((found for source in sources if (found := getattr(source, "padding", None))), None)

    def ids(self, client: int) -> np.ndarray:
        """Return the ids of a client's examples, ascending."""
        return self.starts[client] + np.arange(self.sizes[client])

    def global_positions(self, ids: Tensor) -> Tensor:
        """Return the positions of the examples in the concatenation of all clients, equal on all ranks."""
        return ids + self.offsets[torch.searchsorted(self.ends, ids, right=True)]

    def fetch(self, ids: Tensor) -> tuple[Tree, Tree]:
        return self.fetch_seeded(ids, 0)

    def fetch_seeded(self, ids: Tensor, seed: int) -> tuple[Tree, Tree]:
        """Return the examples as `fetch` does; what their sources draw for each is a function of the seed."""
        if self.made_up:
            return self.made_up.fetch(ids)
        client_of = self.clients[torch.searchsorted(self.ends, ids, right=True)]
        clients = client_of.unique().tolist() or [next(iter(self.local))]
        if len(clients) == 1:
            return self._fetch_from(clients[0], ids, seed)
        rows = [(client_of == client).nonzero().flatten() for client in clients]
        parts = [self._fetch_from(client, ids[row], seed) for client, row in zip(clients, rows, strict=True)]
        inverse = torch.cat(rows).argsort()
        join = concatenate if self.padding is None else self.padding.join
        return take(join(parts), inverse)

    def fingerprint_data(self) -> list[np.ndarray]:
        return [np.array(self.checksums), np.array(self.sizes)]

    def _fetch_from(self, client: int, ids: Tensor, seed: int) -> tuple[Tree, Tree]:
        assert client in self.local, f"the examples of client {client} are in silo {self.homes[client]}"
        return fetch_seeded(self.local[client], ids - self.starts[client], seed, client)


def _described(description: str) -> list[tuple[str, str, str]]:
    """Return the name, the dtype and the sizes of each tensor of a description; a single one has the empty name."""
    return re.findall(r"(?:(\S+) )?(\w+) \[([^\]]*)\]", description)


def _zeros(description: str, count: int) -> Tree:
    """Return zeros of described types.

    "float32 [1, 8, 8]" is a tensor, "age float32 [], ward int64 []" a dict, "0 float32 [], 1 int64 []" a tuple.
    """
    tensors = {
        name: torch.zeros(
            count, *map(int, sizes.replace(ANY, "1").split(", ") if sizes else ()), dtype=getattr(torch, dtype)
        )
        for name, dtype, sizes in _described(description)
    }
    return tuple(tensors.values()) if "0" in tensors else tensors.get("", tensors)
