"""The rendezvous of several nodes: their launchers find each other, and notice that one is lost or waits to join.

torch.distributed.elastic.rendezvous keeps the list of nodes, with shorter times than its defaults: those are 30 seconds
until a late node is accepted, and 15 until a dead one is given up.
"""

from __future__ import annotations

import json
import os
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

from trainer.distributed.launch.reachability import connection_error, is_local_host
from trainer.distributed.launch.world import Interrupted, NodesUnreachableError, Rendezvous, SingleNode, World

POLL_INTERVAL_SECONDS = 0.05
HEARTBEAT_INTERVAL_SECONDS = 1
MAX_MISSED_HEARTBEATS = 4  # by a node that is taken to be lost
MAX_NODES_TIMEOUT_SECONDS = 15  # for the largest number of nodes, at the first start
LAST_CALL_SECONDS = 1  # for more than the smallest number, at each start
JOIN_TIMEOUT_SECONDS = 600  # for the smallest number of nodes
RESPONSE_TIMEOUT_SECONDS = 30  # for the store
SHUTDOWN_TIMEOUT_SECONDS = 10  # for the other nodes, when the run has ended

FIRST = "first/"


class ElasticRendezvous:
    """The rendezvous of `min_nodes` to `max_nodes` nodes.

    Args:
        store: of the run, which outlives its starts
        holds_store: whether the store's server is in this process
        min_nodes: the smallest number that starts
        max_nodes: the largest number
    """

    def __init__(self, store: TCPStore, holds_store: bool, min_nodes: int, max_nodes: int):
        self._store, self._holds_store, self._min_nodes, self._max_nodes = store, holds_store, min_nodes, max_nodes
        self._num_nodes = 0  # of the last world
        self._handler = self._make_handler()
        self._heartbeat: NodeHeartbeat | None = None

    def _make_handler(self) -> RendezvousHandler:
        # Otherwise node 0 of an earlier world does not publish the workers' address again, and a new node waits for it.
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
        info = self._join(stop_requested)
        store, nodes = info.store, info.world_size
        self._num_nodes = nodes
        store.set(f"node/{info.rank}", json.dumps([workers, restart]))
        per_node = [json.loads(store.get(f"node/{node}")) for node in range(nodes)]
        waiting = self._handler.num_nodes_waiting
        self._heartbeat = NodeHeartbeat(PrefixStore("pulse", store), info.rank, nodes, lambda: waiting() > 0)
        counts, restarts = zip(*per_node, strict=True)
        return World(info.rank, tuple(counts), self._store.host, self._store.port, max(restarts))

    def _wait_for_max_nodes(self, stop_requested: Callable[[], object]) -> None:
        """Give the largest number of nodes some time to come, unless the run was started without them."""
        deadline = time.monotonic() + MAX_NODES_TIMEOUT_SECONDS
        self._store.add("came", 1)
        while self._store.add("came", 0) < self._max_nodes and not self._store.add(FIRST + "config", 0):
            if time.monotonic() > deadline or stop_requested():
                return
            time.sleep(POLL_INTERVAL_SECONDS)

    def _join(self, stop_requested: Callable[[], object]) -> RendezvousInfo:
        """Wait until enough nodes have come."""
        # In a thread, because torch's call cannot be interrupted.
        outcome: list[RendezvousInfo | Exception] = []

        def join() -> None:
            try:
                outcome.append(self._handler.next_rendezvous())
            except Exception as error:
                outcome.append(error)

        Thread(target=join, daemon=True).start()
        while not outcome:
            if stop_requested():
                raise Interrupted
            time.sleep(POLL_INTERVAL_SECONDS)
        if isinstance(outcome[0], RendezvousInfo):
            return outcome[0]
        raise NodesUnreachableError(self._reason(outcome[0])) from outcome[0]

    def _reason(self, error: Exception) -> str:
        where = f"launch.rdzv_endpoint={self._store.host}:{self._store.port}"
        if isinstance(error, RendezvousClosedError):
            return f"the run at {where} has ended on another node"
        if isinstance(error, RendezvousTimeoutError):
            return f"{where}: fewer than {self._min_nodes} nodes came within {JOIN_TIMEOUT_SECONDS} s"
        return f"{where}: the node that holds the store is lost ({str(error).splitlines()[0]})"

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
        """Stop the heartbeat of this node."""
        if self._heartbeat:
            self._heartbeat.stop()

    def close(self) -> None:
        """End the rendezvous, which no node can join any more."""
        if self._heartbeat:
            self._heartbeat.leave()
        with suppress(Exception):  # the store may be gone with its node
            self._handler.shutdown()
            self._store.set(f"left/{self._store.add('left', 1)}", "")
            if self._holds_store and self._num_nodes:
                # The others still need the store of this process.
                self._store.wait([f"left/{self._num_nodes}"], timedelta(seconds=SHUTDOWN_TIMEOUT_SECONDS))


class NodeHeartbeat:
    """Publishes a beat of this node once a second. Node 0 watches all nodes, and all watch node 0.

    Args:
        store: of this start of the world
        node: the index of this node
        nodes: the number of nodes
        has_waiting_nodes: whether a node waits to join
    """

    def __init__(self, store: Store, node: int, nodes: int, has_waiting_nodes: Callable[[], bool]):
        self._store, self._node, self._has_waiting_nodes = store, node, has_waiting_nodes
        self._watched = range(1, nodes) if node == 0 else range(1)
        self._last_beats: dict[int, tuple[int, float]] = {}
        self._changed, self._ended = Event(), Event()
        Thread(target=self._beat, daemon=True).start()

    def membership_changed(self, patience: float) -> bool:
        return self._changed.wait(patience)

    def announce_restart(self) -> None:
        with suppress(RuntimeError):  # the store is gone with its node, which the next rendezvous reports
            self._store.set("changed", "")

    def leave(self) -> None:
        """Stop the heartbeat, and let the other nodes know that this is because the run has ended."""
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
                    return  # nodes that fall silent now have left, too
        except Exception:  # the store is gone
            self._changed.set()

    def _has_lost_node(self) -> bool:
        """Whether a watched node has missed too many beats."""
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
    nodes: int | tuple[int, int], endpoint: str | None, stop_requested: Callable[[], object]
) -> Iterator[Rendezvous]:
    """Open the rendezvous of the nodes of a run, and close it with the block.

    Args:
        nodes: how many, or the smallest and the largest number
        endpoint: host:port of one of them, which holds the store; not needed for a single node
        stop_requested: whether this process was asked to stop

    Raises:
        ValueError: the endpoint is not host:port
        Interrupted: this process was asked to stop while it waited for the endpoint
        NodesUnreachableError: the endpoint has not answered
    """
    min_nodes, max_nodes = (nodes, nodes) if isinstance(nodes, int) else nodes
    if max_nodes == 1:
        yield SingleNode(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        return
    elastic = ElasticRendezvous(*_open_store(endpoint, stop_requested), min_nodes, max_nodes)
    try:
        yield elastic
    finally:
        elastic.close()


def _open_store(endpoint: str | None, stop_requested: Callable[[], object]) -> tuple[TCPStore, bool]:
    """Return the store at host:port, and whether this process holds it."""
    host, _, port = (endpoint or "").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"launch.rdzv_endpoint={endpoint or 'null'}\n"
            "  valid: host:port of one of the nodes, the same on all of them"
        )
    patience = timedelta(seconds=RESPONSE_TIMEOUT_SECONDS)
    if is_local_host(host):
        with suppress(RuntimeError):  # another launcher on this machine was first
            return TCPStore(host, int(port), is_master=True, wait_for_workers=False, timeout=patience), True
    if error := connection_error(host, int(port), JOIN_TIMEOUT_SECONDS, stop_requested):
        if stop_requested():
            raise Interrupted
        late = f"no answer for {JOIN_TIMEOUT_SECONDS} s ({error})"
        raise NodesUnreachableError(f"launch.rdzv_endpoint={endpoint}: {late}")
    return TCPStore(host, int(port), is_master=False, timeout=patience), False
