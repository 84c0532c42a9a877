"""Compute a partition on the first rank, and share it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from trainer.data.partition.clients import Clients
from trainer.data.sources.base import DataSplits
from trainer.distributed import collectives
from trainer.distributed.topology import Topology


def split_on_first_rank(split: Callable[[], Clients], data: DataSplits, count: int, topology: Topology) -> Clients:
    """Return the clients that `split` returns on rank 0; a collective, which sends 4 bytes an example.

    In a world without process groups, as `plan` has it, each rank computes them.

    Raises:
        ValueError: on all ranks alike, that of rank 0.
    """
    if topology.silo_group is None:
        return split()
    clients, error = None, ""
    if topology.rank == 0:
        try:
            clients = split()
        except ValueError as refused:
            error = str(refused)
    if error := collectives.broadcast_text(error):
        raise ValueError(error)
    ends = np.cumsum([len(source) for source in data.parts.values()])
    client_of = torch.empty(int(ends[-1]), dtype=torch.int32)
    if clients:
        parts = (clients.train, clients.test, clients.validation)[: len(ends)]
        for ids_by_client, start in zip(parts, (0, *ends), strict=False):
            for client, ids in enumerate(ids_by_client):
                client_of[start + torch.from_numpy(ids)] = client
    train, test, *validation = np.split(collectives.broadcast(client_of).long().numpy(), ends[:-1])
    return Clients.of(train, test, count, *validation)
