"""The nodes of one start of a run's workers, and the rendezvous at which their launchers agree on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


class Interrupted(Exception):
    """This process was asked to stop while it waited for other nodes."""


class NodesUnreachableError(Exception):
    """The nodes of the run have not come together, or have lost each other."""


@dataclass(frozen=True)
class World:
    """The nodes of one start of the workers.

    node     the index of this node
    workers  the number of workers of each node
    host     and `port`: of the store through which the workers find each other
    restart  how often the workers were started before
    """

    node: int
    workers: tuple[int, ...]
    host: str
    port: int
    restart: int

    @property
    def size(self) -> int:
        return sum(self.workers)

    @property
    def first_rank(self) -> int:
        return sum(self.workers[: self.node])

    @property
    def nodes(self) -> list[int]:
        """The node of each rank."""
        return [node for node, workers in enumerate(self.workers) for _ in range(workers)]


class Rendezvous(Protocol):
    """The launchers of a run, one a node: how they agree on a world, and notice that it changes."""

    def next_world(self, workers: int, restart: int, stop_requested: Callable[[], object]) -> World:
        """Wait for the other nodes, and return the world that starts next.

        Args:
            workers: the number of workers of this node
            restart: how often they were started before
            stop_requested: whether this process was asked to stop

        Raises:
            Interrupted: this process was asked to stop while it waited
            NodesUnreachableError: too few nodes have come
        """
        ...

    def broadcast(self, key: str, make: Callable[[], str]) -> str:
        """Return the text of the first node that asks for this key; `make` is called on that node alone."""
        ...

    def announce_restart(self) -> None:
        """Let the other nodes know that this one starts its workers again."""
        ...

    def membership_changed(self, patience: float = 0) -> bool:
        """Whether a node of the world is lost, starts again, or waits to join; wait up to `patience` seconds for it."""
        ...


class SingleNode:
    """The rendezvous of a run on this machine alone."""

    def __init__(self, store: TCPStore):
        self._store = store

    def next_world(self, workers: int, restart: int, stop_requested: Callable[[], object]) -> World:
        return World(0, (workers,), self._store.host, self._store.port, restart)

    def broadcast(self, key: str, make: Callable[[], str]) -> str:
        return make()

    def announce_restart(self) -> None:
        pass

    def membership_changed(self, patience: float = 0) -> bool:
        return False
