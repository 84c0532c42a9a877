"""The nodes of one start of a run's workers, and where their launchers meet to agree on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


class Interrupted(Exception):
    """This process was told to stop while it waited for other nodes."""


class NodesUnreachableError(Exception):
    """The nodes of the run have not come together, or do not any more."""


@dataclass(frozen=True)
class World:
    """The nodes of one start of the workers: which of them this one is, how many workers each has, where they meet."""

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
    """Where the launchers of a run meet."""

    def next_world(self, workers: int, restart: int, stop_requested: Callable[[], object]) -> World:
        """The world that starts next, this node with so many workers."""
        ...

    def broadcast(self, key: str, make: Callable[[], str]) -> str:
        """The text that whichever node is first to ask makes, on every node, now and later."""
        ...

    def announce_restart(self) -> None:
        """Tells the other nodes that this one starts its workers again."""
        ...

    def membership_changed(self, patience: float = 0) -> bool:
        """Whether a node of the world is lost, begins again, or waits to join it; waits so many seconds for that."""
        ...


class SingleNode:
    """This machine alone."""

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
