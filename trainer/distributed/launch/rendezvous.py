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

from trainer.distributed.launch.world import Interrupted, NodesUnreachableError, Rendezvous, SingleNode, World

POLL_INTERVAL_SECONDS = 0.05
HEARTBEAT_INTERVAL_SECONDS = 1
MAX_MISSED_HEARTBEATS = 4  # by a node that is taken to be lost
MAX_NODES_TIMEOUT_SECONDS = 15  # when the run begins
LAST_CALL_SECONDS = 1  # when it goes on
JOIN_TIMEOUT_SECONDS = 600  # for the least number of nodes
RESPONSE_TIMEOUT_SECONDS = 30  # for the store
SHUTDOWN_TIMEOUT_SECONDS = 10  # for the other nodes, when the run has ended

FIRST = "first/"


class ElasticRendezvous:
    """From `least` to `most` nodes, that meet at the store."""

    def __init__(self, store: TCPStore, holds_store: bool, min_nodes: int, max_nodes: int):
        self._store, self._holds_store, self._min_nodes, self._max_nodes = store, holds_store, min_nodes, max_nodes
        self._num_nodes = 0  # of the last world
        self._handler = self._make_handler()
        self._heartbeat: NodeHeartbeat | None = None

    def _make_handler(self) -> RendezvousHandler:
        # Else a node 0 that has met others before does not say again where workers meet, and a new node waits for it.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        backend = C10dRendezvousBackend(self._store, "nodes")
        settings: dict[str, Any] = {
            "join_timeout": JOIN_TIMEOUT_SECONDS,
            "last_call_timeout": LAST_CALL_SECONDS,
            "keep_alive_interval": HEARTBEAT_INTERVAL_SECONDS,
            "keep_alive_max_attempt": MAX_MISSED_HEARTBEATS,
        }
        where = f"{self._store.host}:{self._store.port}"
        parameters = RendezvousParameters("c10d", where, "nodes", self._min_nodes, self._max_nodes, **settings)
        return create_handler(self._store, backend, parameters)

    def next_world(self, workers: int, restart: int, stop_requested: Callable[[], object]) -> World:
        self.stop_heartbeat()
        if not self._num_nodes:
            self._wait_for_max_nodes(stop_requested)
        came = self._join(stop_requested)
        store, nodes = came.store, came.world_size
        self._num_nodes = nodes
        store.set(f"node/{came.rank}", json.dumps([workers, restart]))
        said = [json.loads(store.get(f"node/{node}")) for node in range(nodes)]
        waiting = self._handler.num_nodes_waiting
        self._heartbeat = NodeHeartbeat(PrefixStore("pulse", store), came.rank, nodes, lambda: waiting() > 0)
        counts, restarts = zip(*said, strict=True)
        return World(came.rank, tuple(counts), self._store.host, self._store.port, max(restarts))

    def _wait_for_max_nodes(self, stop_requested: Callable[[], object]) -> None:
        """Gives all nodes some time to come, unless the run goes on already."""
        deadline = time.monotonic() + MAX_NODES_TIMEOUT_SECONDS
        self._store.add("came", 1)
        while self._store.add("came", 0) < self._max_nodes and not self._store.add(FIRST + "config", 0):
            if time.monotonic() > deadline or stop_requested():
                return
            time.sleep(POLL_INTERVAL_SECONDS)

    def _join(self, stop_requested: Callable[[], object]) -> RendezvousInfo:
        """What the rendezvous says when enough nodes have come."""
        ended: list[RendezvousInfo | Exception] = []

        def come() -> None:
            try:
                ended.append(self._handler.next_rendezvous())
            except Exception as error:
                ended.append(error)

        Thread(target=come, daemon=True).start()
        while not ended:
            if stop_requested():
                raise Interrupted
            time.sleep(POLL_INTERVAL_SECONDS)
        if isinstance(ended[0], RendezvousInfo):
            return ended[0]
        raise NodesUnreachableError(self._reason(ended[0])) from ended[0]

    def _reason(self, error: Exception) -> str:
        where = f"launch.rdzv_endpoint={self._store.host}:{self._store.port}"
        if isinstance(error, RendezvousClosedError):
            return f"the run at {where} has ended on another node"
        if isinstance(error, RendezvousTimeoutError):
            return f"{where}: fewer than {self._min_nodes} nodes came within {JOIN_TIMEOUT_SECONDS} s"
        return f"{where}: the node that all meet at is lost ({str(error).splitlines()[0]})"

    def broadcast(self, key: str, make: Callable[[], str]) -> str:
        if self._store.add(FIRST + key, 1) == 1:
            self._store.set(key, make())
        return self._store.get(key).decode()

    def announce_restart(self) -> None:
        assert self._heartbeat, "no world was gathered"
        self._heartbeat.announce_restart()

    def membership_changed(self, patience: float = 0) -> bool:
        assert self._heartbeat, "no world was gathered"
        return self._heartbeat.membership_changed(patience)

    def stop_heartbeat(self) -> None:
        """Stops to say that this node is there."""
        if self._heartbeat:
            self._heartbeat.stop()

    def close(self) -> None:
        """Lets nobody else join: the run has ended. The store goes last, if it is on this node."""
        if self._heartbeat:
            self._heartbeat.leave()
        with suppress(Exception):  # the store may be gone with its node
            self._handler.shutdown()
            self._store.set(f"left/{self._store.add('left', 1)}", "")
            if self._holds_store and self._num_nodes:
                self._store.wait([f"left/{self._num_nodes}"], timedelta(seconds=SHUTDOWN_TIMEOUT_SECONDS))


class NodeHeartbeat:
    """Once a second this node says that it is there. Node 0 watches all nodes, and all watch node 0."""

    def __init__(self, store: Store, node: int, nodes: int, has_waiting_nodes: Callable[[], bool]):
        self._store, self._node, self._has_waiting_nodes = store, node, has_waiting_nodes
        self._watched = range(1, nodes) if node == 0 else range(1)
        self._last_beats: dict[int, tuple[int, float]] = {}
        self._changed, self._ended = Event(), Event()
        Thread(target=self._beat, daemon=True).start()

    def membership_changed(self, patience: float) -> bool:
        return self._changed.wait(patience)

    def announce_restart(self) -> None:
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
            while not self._ended.wait(HEARTBEAT_INTERVAL_SECONDS) and not self._changed.is_set():
                self._store.add(f"beat/{self._node}", 1)
                if self._has_lost_node() or self._has_waiting_nodes():
                    self.announce_restart()
                if self._store.check(["changed"]):
                    self._changed.set()
                elif self._store.check(["left"]):
                    return  # who falls silent now has left, too
        except Exception:  # the store is gone
            self._changed.set()

    def _has_lost_node(self) -> bool:
        """Whether a node has fallen silent."""
        now = time.monotonic()
        for node in self._watched:
            beats = self._store.add(f"beat/{node}", 0)
            if node not in self._last_beats or self._last_beats[node][0] != beats:
                self._last_beats[node] = beats, now
        return any(
            now - moment > MAX_MISSED_HEARTBEATS * HEARTBEAT_INTERVAL_SECONDS for _, moment in self._last_beats.values()
        )


@contextmanager
def open_rendezvous(
    nodes: int | list[int], endpoint: str | None, stop_requested: Callable[[], object]
) -> Iterator[Rendezvous]:
    """Where so many nodes, or from least to most, meet; closed when the block is left.

    `endpoint` is host:port of one of them, which holds the store. Raises ValueError if it is needed and not given,
    Interrupted when this process `stop_requested` to stop while it waits for an answer there, Apart when none comes.
    """
    least, most = (nodes, nodes) if isinstance(nodes, int) else nodes
    if most == 1:
        yield SingleNode(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        return
    met = ElasticRendezvous(*_store(endpoint, stop_requested), least, most)
    try:
        yield met
    finally:
        met.close()


def _store(endpoint: str | None, stop_requested: Callable[[], object]) -> tuple[TCPStore, bool]:
    """The store at host:port, and whether this process holds it."""
    host, _, port = (endpoint or "").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"launch.rdzv_endpoint={endpoint or 'null'}\n  valid: host:port of one of the nodes, the same on all of them"
        )
    patience = timedelta(seconds=RESPONSE_TIMEOUT_SECONDS)
    if _is_local_host(host):
        with suppress(RuntimeError):  # another launcher on this machine was first
            return TCPStore(host, int(port), is_master=True, wait_for_workers=False, timeout=patience), True
    deadline = time.monotonic() + JOIN_TIMEOUT_SECONDS
    while not _is_listening(host, int(port)):
        if stop_requested():
            raise Interrupted
        if time.monotonic() > deadline:
            raise NodesUnreachableError(
                f"launch.rdzv_endpoint={endpoint}: nobody answered there for {JOIN_TIMEOUT_SECONDS} s"
            )
    return TCPStore(host, int(port), is_master=False, timeout=patience), False


def _is_listening(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        time.sleep(POLL_INTERVAL_SECONDS)
        return False
    return True


def _is_local_host(host: str) -> bool:
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
