"""The nodes of one start of a run's workers, and the rendezvous at which their launchers agree on them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from trainer.distributed.launch.reachability import LOOPBACK, listen


class Interrupted(Exception):
    """This process was asked to stop while it waited for other nodes."""


class NodesUnreachableError(Exception):
    """The nodes of the run have not come together, or have lost each other."""


@dataclass(frozen=True)
class World:
    """The nodes of one start of the workers.

    node      the index of this node
    workers   the number of workers of each node
    host      and `port`: of the store through which the workers find each other
    restart   how often the workers were started before
    listener  the socket of that port, if rank 0 is on this node, which takes it over
    """

    node: int
    workers: tuple[int, ...]
    host: str
    port: int
    restart: int
    listener: socket.socket | None = None

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
    """The launchers of a run, one a node: how they agree on a world, and notice that it changes.

    agreed  the text that one of them has made for all, known after the first world
    token   of the launch
    """

    agreed: str
    token: bytes

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

    def announce_restart(self) -> None:
        """Let the other nodes know that this one starts its workers again."""
        ...

    def membership_changed(self, patience: float = 0) -> bool:
        """Whether a node of the world is lost, starts again, or waits to join; wait up to `patience` seconds for it."""
        ...


class SingleNode:
    """The rendezvous of a run on this machine alone. Nothing of it can be reached from another one.

    Args:
        token: of the launch
        agree: makes the text on which all nodes agree
    """

    def __init__(self, token: bytes, agree: Callable[[World], str]):
        self.agreed, self.token, self._agree = "", token, agree
        self._listener: socket.socket | None = None

    def next_world(self, workers: int, restart: int, stop_requested: Callable[[], object]) -> World:
        self._listener = listen(host=LOOPBACK)
        world = World(0, (workers,), LOOPBACK, self._listener.getsockname()[1], restart, self._listener)
        self.agreed = self.agreed or self._agree(world)
        return world

    def announce_restart(self) -> None:
        pass

    def membership_changed(self, patience: float = 0) -> bool:
        return False

    def close(self) -> None:
        if self._listener:
            self._listener.close()
