"""How the launchers of a run's nodes find each other, and notice that one is lost or waits to join.

torch's own rendezvous keeps the list of nodes (torch.distributed.elastic.rendezvous). Its settings are ours: by default
it takes 30 seconds for a late node to come and 15 to give a dead one up.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from trainer.distributed.launch.world import Apart, Here, Interrupted, Meeting, World

SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_BETWEEN_BEATS = 1
BEATS_MISSED = 4  # by a node that is taken to be lost
SECONDS_FOR_THE_MOST = 15  # when the run begins
SECONDS_FOR_LATE_NODES = 1  # when it goes on
SECONDS_TO_COME = 600  # for the least number of nodes
SECONDS_TO_ANSWER = 30  # for the store
SECONDS_TO_LEAVE = 10  # for the other nodes, when the run has ended

FIRST = "first/"


class Nodes:
    """From `least` to `most` nodes, that meet at the store."""

    def __init__(self, store: TCPStore, holds_store: bool, least: int, most: int):
        self._store, self._holds_store, self._least, self._most = store, holds_store, least, most
        self._nodes = 0  # of the last world
        self._handler = self._rendezvous()
        self._pulse: NodesPulse | None = None

    def _rendezvous(self) -> RendezvousHandler:
        # Else a node 0 that has met others before does not say again where workers meet, and a new node waits for it.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        backend = C10dRendezvousBackend(self._store, "nodes")
        settings: dict[str, Any] = {
            "join_timeout": SECONDS_TO_COME,
            "last_call_timeout": SECONDS_FOR_LATE_NODES,
            "keep_alive_interval": SECONDS_BETWEEN_BEATS,
            "keep_alive_max_attempt": BEATS_MISSED,
        }
        where = f"{self._store.host}:{self._store.port}"
        parameters = RendezvousParameters("c10d", where, "nodes", self._least, self._most, **settings)
        return create_handler(self._store, backend, parameters)

    def gather(self, workers: int, restart: int, is_told: Callable[[], object]) -> World:
        self.rest()
        if not self._nodes:
            self._await_the_most(is_told)
        came = self._come(is_told)
        store, nodes = came.store, came.world_size
        self._nodes = nodes
        store.set(f"node/{came.rank}", json.dumps([workers, restart]))
        said = [json.loads(store.get(f"node/{node}")) for node in range(nodes)]
        waiting = self._handler.num_nodes_waiting
        self._pulse = NodesPulse(PrefixStore("pulse", store), came.rank, nodes, lambda: waiting() > 0)
        counts, restarts = zip(*said, strict=True)
        return World(came.rank, tuple(counts), self._store.host, self._store.port, max(restarts))

    def _await_the_most(self, is_told: Callable[[], object]) -> None:
        """Gives all nodes some time to come, unless the run goes on already."""
        deadline = time.monotonic() + SECONDS_FOR_THE_MOST
        self._store.add("came", 1)
        while self._store.add("came", 0) < self._most and not self._store.add(FIRST + "config", 0):
            if time.monotonic() > deadline or is_told():
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _come(self, is_told: Callable[[], object]) -> RendezvousInfo:
        """What the rendezvous says when enough nodes have come."""
        ended: list[RendezvousInfo | Exception] = []

        def come() -> None:
            try:
                ended.append(self._handler.next_rendezvous())
            except Exception as error:
                ended.append(error)

        Thread(target=come, daemon=True).start()
        while not ended:
            if is_told():
                raise Interrupted
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if isinstance(ended[0], RendezvousInfo):
            return ended[0]
        raise Apart(self._reason(ended[0])) from ended[0]

    def _reason(self, error: Exception) -> str:
        where = f"launch.rdzv_endpoint={self._store.host}:{self._store.port}"
        if isinstance(error, RendezvousClosedError):
            return f"the run at {where} has ended on another node"
        if isinstance(error, RendezvousTimeoutError):
            return f"{where}: fewer than {self._least} nodes came within {SECONDS_TO_COME} s"
        return f"{where}: the node that all meet at is lost ({str(error).splitlines()[0]})"

    def share(self, key: str, make: Callable[[], str]) -> str:
        if self._store.add(FIRST + key, 1) == 1:
            self._store.set(key, make())
        return self._store.get(key).decode()

    def announce(self) -> None:
        assert self._pulse, "no world was gathered"
        self._pulse.announce()

    def has_changed(self, patience: float = 0) -> bool:
        assert self._pulse, "no world was gathered"
        return self._pulse.has_changed(patience)

    def rest(self) -> None:
        """Stops to say that this node is there."""
        if self._pulse:
            self._pulse.stop()

    def close(self) -> None:
        """Lets nobody else join: the run has ended. The store goes last, if it is on this node."""
        if self._pulse:
            self._pulse.leave()
        with suppress(Exception):  # the store may be gone with its node
            self._handler.shutdown()
            self._store.set(f"left/{self._store.add('left', 1)}", "")
            if self._holds_store and self._nodes:
                self._store.wait([f"left/{self._nodes}"], timedelta(seconds=SECONDS_TO_LEAVE))


class NodesPulse:
    """Once a second this node says that it is there. Node 0 watches all nodes, and all watch node 0."""

    def __init__(self, store: Store, node: int, nodes: int, is_awaited: Callable[[], bool]):
        self._store, self._node, self._is_awaited = store, node, is_awaited
        self._watched = range(1, nodes) if node == 0 else range(1)
        self._heard: dict[int, tuple[int, float]] = {}
        self._changed, self._ended = Event(), Event()
        Thread(target=self._beat, daemon=True).start()

    def has_changed(self, patience: float) -> bool:
        return self._changed.wait(patience)

    def announce(self) -> None:
        with suppress(RuntimeError):  # the store is gone, with the node that it was on: the next meeting says so
            self._store.set("changed", "")

    def leave(self) -> None:
        """Tells the other nodes that this one falls silent because the run has ended."""
        with suppress(RuntimeError):
            self._store.set("left", "")
        self.stop()

    def stop(self) -> None:
        self._ended.set()

    def _beat(self) -> None:
        try:
            while not self._ended.wait(SECONDS_BETWEEN_BEATS) and not self._changed.is_set():
                self._store.add(f"beat/{self._node}", 1)
                if self._has_lost() or self._is_awaited():
                    self.announce()
                if self._store.check(["changed"]):
                    self._changed.set()
                elif self._store.check(["left"]):
                    return  # who falls silent now has left, too
        except Exception:  # the store is gone
            self._changed.set()

    def _has_lost(self) -> bool:
        """Whether a node has fallen silent."""
        now = time.monotonic()
        for node in self._watched:
            beats = self._store.add(f"beat/{node}", 0)
            if node not in self._heard or self._heard[node][0] != beats:
                self._heard[node] = beats, now
        return any(now - moment > BEATS_MISSED * SECONDS_BETWEEN_BEATS for _, moment in self._heard.values())


@contextmanager
def meeting(nodes: int | list[int], where: str | None, is_told: Callable[[], object]) -> Iterator[Meeting]:
    """Where so many nodes, or from least to most, meet; closed when the block is left.

    `where` is host:port of one of them, which holds the store. Raises ValueError if it is needed and not given,
    Interrupted when this process `is_told` to stop while it waits for an answer there, Apart when none comes.
    """
    least, most = (nodes, nodes) if isinstance(nodes, int) else nodes
    if most == 1:
        yield Here(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        return
    met = Nodes(*_store(where, is_told), least, most)
    try:
        yield met
    finally:
        met.close()


def _store(where: str | None, is_told: Callable[[], object]) -> tuple[TCPStore, bool]:
    """The store at host:port, and whether this process holds it."""
    host, _, port = (where or "").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"launch.rdzv_endpoint={where or 'null'}\n  valid: host:port of one of the nodes, the same on all of them"
        )
    patience = timedelta(seconds=SECONDS_TO_ANSWER)
    if _is_here(host):
        with suppress(RuntimeError):  # another launcher on this machine was first
            return TCPStore(host, int(port), is_master=True, wait_for_workers=False, timeout=patience), True
    deadline = time.monotonic() + SECONDS_TO_COME
    while not _answers(host, int(port)):
        if is_told():
            raise Interrupted
        if time.monotonic() > deadline:
            raise Apart(f"launch.rdzv_endpoint={where}: nobody answered there for {SECONDS_TO_COME} s")
    return TCPStore(host, int(port), is_master=False, timeout=patience), False


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        return False
    return True


def _is_here(host: str) -> bool:
    """Whether the name is one of this machine."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"launch.rdzv_endpoint: there is no host {host}: {error.strerror}") from error
    with socket.socket(address[0], socket.SOCK_STREAM) as tried:
        try:
            tried.bind((address[4][0], 0))
        except OSError:
            return False
    return True
