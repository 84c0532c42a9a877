"""Assign clients to silos: a pure function, equal on every rank, so nothing is sent."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_clients(clients: Sequence[int], sizes: Sequence[int], silo_sizes: Sequence[int]) -> list[list[int]]:
    """Assign clients so that silos finish at about the same time.

    The largest client comes first, and each goes to the silo that would finish it earliest, in examples per replica.

    Args:
        clients: the clients to assign.
        sizes: number of examples by client.
        silo_sizes: number of replicas by silo.

    Returns:
        The clients of each silo, ascending.
    """
    loads = [(0.0, silo) for silo in range(len(silo_sizes))]
    assigned: list[list[int]] = [[] for _ in silo_sizes]
    for client in sorted(clients, key=lambda client: (-sizes[client], client)):
        load, silo = heapq.heappop(loads)
        assigned[silo].append(client)
        heapq.heappush(loads, (load + sizes[client] / silo_sizes[silo], silo))
    return [sorted(members) for members in assigned]
