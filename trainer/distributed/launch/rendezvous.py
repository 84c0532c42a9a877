"""The rendezvous of several nodes: their launchers find each other, and notice that one is lost or waits to join.

The launcher at the endpoint decides who takes part. Each other one keeps a connection to it: whoever is silent on it
for `SILENCE_SECONDS` is lost. All messages are signed JSON, of one key:

    offer    workers, restarts and port of a node that wants to take part in the next world
    world    its nodes, from the host to each of them
    restart  a node of the world of this number is lost or starts again, or another one waits to join
    left     the run has ended on a node, and so for all
    beat     once a second, with an answer
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, RLock, Thread
from typing import Any

from trainer.distributed.launch.channel import Channel, Message, UntrustedError
from trainer.distributed.launch.reachability import connection_error, is_local_host, listen, parse_endpoint
from trainer.distributed.launch.world import Interrupted, NodesUnreachableError, Rendezvous, SingleNode, World
from trainer.distributed.token import draw_token, find_token

POLL_INTERVAL_SECONDS = 0.05
HEARTBEAT_INTERVAL_SECONDS = 1
MAX_NODES_TIMEOUT_SECONDS = 15  # for the largest number of nodes, at the first start
LAST_CALL_SECONDS = 1  # for more than the smallest number, at each start
JOIN_TIMEOUT_SECONDS = 600  # for the smallest number of nodes
RECONNECT_TIMEOUT_SECONDS = 30  # for a host that was lost
FAREWELL_SECONDS = 1  # for the host to answer that the run has ended


@dataclass(frozen=True)
class Offer:
    """A node that is ready to start.

    name     its host name and process id, by which nodes are ordered
    workers  the number of its workers
    restart  how often they were started before
    port     at which it would listen for the store of rank 0
    address  at which the others reach it
    """

    name: tuple[str, int]
    workers: int
    restart: int
    port: int
    address: str


class HostRendezvous:
    """The rendezvous on the node whose launcher decides.

    Args:
        listener: of the endpoint
        host: at which the other nodes reach this one
        token: of the launch
        nodes: the smallest number that starts, and the largest
        agree: makes the text on which all nodes agree
    """

    def __init__(
        self, listener: socket.socket, host: str, token: bytes, nodes: tuple[int, int], agree: Callable[[World], str]
    ):
        self.agreed, self.token = "", token
        self._listener, self._host, self._agree = listener, host, agree
        self._where = f"launch.rdzv_endpoint={host}:{listener.getsockname()[1]}"
        self._min_nodes, self._max_nodes = nodes
        self._lock = RLock()
        self._offers: dict[Channel | None, Offer | None] = {None: None}  # of the nodes that are connected; None: ours
        self._world: list[Channel | None] = []
        self._number = 0  # of the world
        self._refused: set[str] = set()
        self._changed, self._ended = Event(), Event()
        Thread(target=self._accept, daemon=True).start()

    def next_world(self, workers: int, restart: int, stop_requested: Callable[[], object]) -> World:
        listener = listen()
        with self._lock:
            self._world = []
            offer = Offer(_own_name(), workers, restart, listener.getsockname()[1], self._host)
            self._offers[None] = offer
        try:
            offers = self._gather(stop_requested)
        except (Interrupted, NodesUnreachableError):
            listener.close()
            raise
        nodes = sorted(offers.values(), key=lambda offer: offer.name)
        restart = max(offer.restart for offer in nodes)

        def world_of(offer: Offer) -> tuple[Any, ...]:
            return nodes.index(offer), [other.workers for other in nodes], nodes[0].address, nodes[0].port, restart

        world = _make_world(listener, *world_of(offer))
        self.agreed = self.agreed or self._agree(world)
        for channel, other in offers.items():
            if channel:
                with suppress(OSError):  # it is lost, which its thread notices
                    channel.send({"world": [self._number, self.agreed, *world_of(other)]})
        return world

    def _gather(self, stop_requested: Callable[[], object]) -> dict[Channel | None, Offer]:
        """Wait for enough nodes, and return what they offer."""
        begun = time.monotonic()
        patience = LAST_CALL_SECONDS if self._number else MAX_NODES_TIMEOUT_SECONDS
        while True:
            waited = time.monotonic() - begun
            with self._lock:
                ready = {channel: offer for channel, offer in self._offers.items() if offer}
                are_all = len(ready) == len(self._offers) and waited > patience  # others may still end their workers
                if len(ready) >= self._max_nodes or (len(ready) >= self._min_nodes and are_all):
                    chosen = dict(list(ready.items())[: self._max_nodes])
                    self._offers |= dict.fromkeys(chosen)
                    self._world, self._number = list(chosen), self._number + 1
                    self._changed.clear()
                    return chosen
            if self._ended.is_set():
                raise NodesUnreachableError(f"the run at {self._where} has ended on another node")
            if stop_requested():
                raise Interrupted
            if waited > JOIN_TIMEOUT_SECONDS:
                raise NodesUnreachableError(
                    f"{self._where}: fewer than {self._min_nodes} nodes came within {JOIN_TIMEOUT_SECONDS} s"
                )
            time.sleep(POLL_INTERVAL_SECONDS)

    def announce_restart(self) -> None:
        with self._lock:
            self._changed.set()
            self._send_all({"restart": self._number}, self._world)

    def membership_changed(self, patience: float = 0) -> bool:
        return self._changed.wait(patience)

    def close(self) -> None:
        """End the run for all nodes; nothing listens any more."""
        self._end()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        with self._lock:
            for channel in filter(None, self._offers):
                channel.close()

    def _end(self) -> None:
        with self._lock:
            self._ended.set()
            self._send_all({"left": True}, list(self._offers))

    def _send_all(self, message: Message, channels: list[Channel | None]) -> None:
        for channel in filter(None, channels):
            with suppress(OSError):  # it is lost, which its thread notices
                channel.send(message)

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed; or too many files are open
                time.sleep(POLL_INTERVAL_SECONDS)
                continue
            Thread(target=self._serve, args=(connection, address[0].removeprefix("::ffff:")), daemon=True).start()

    def _serve(self, connection: socket.socket, address: str) -> None:
        """Handle the messages of a node until it is lost."""
        channel = None
        try:
            channel = Channel(connection, self.token, is_caller=False)
            while True:
                self._handle(channel, address, channel.receive())
        except UntrustedError:
            if address not in self._refused:
                self._refused.add(address)
                print(f"refused {address}: it does not hold the token of this run", file=sys.stderr, flush=True)
        except OSError:
            pass
        finally:
            connection.close()
            if channel:
                self._remove(channel)

    def _handle(self, channel: Channel, address: str, message: Message) -> None:
        if "beat" in message:
            channel.send(message)  # without the lock: a node that takes nothing must not silence the others
            return
        with self._lock:
            match message:
                case {"offer": [name, workers, restart, port]}:
                    self._offers[channel] = Offer(tuple(name), workers, restart, port, address)
                    if self._world and channel not in self._world and len(self._world) < self._max_nodes:
                        self.announce_restart()
                case {"restart": self._number}:
                    self.announce_restart()
                case {"left": True} if channel in self._world or not self._world:
                    self._end()
                case _:
                    pass

    def _remove(self, channel: Channel) -> None:
        with self._lock:
            self._offers.pop(channel, None)
            if channel in self._world and not self._ended.is_set():
                self.announce_restart()


class MemberRendezvous:
    """The rendezvous on a node that asks the host.

    Args:
        host: and
        port: of the endpoint
        token: of the launch
    """

    def __init__(self, host: str, port: int, token: bytes):
        self.agreed, self.token = "", token
        self._host, self._port = host, port
        self._where = f"launch.rdzv_endpoint={host}:{port}"
        self._channel: Channel | None = None  # to the host; None if it is not connected
        self._worlds: SimpleQueue[list[Any] | None] = SimpleQueue()  # None: the host is lost
        self._number = 0
        self._is_trusted = False  # whether the host has proved that it holds the token
        self._changed, self._ended = Event(), Event()

    def next_world(self, workers: int, restart: int, stop_requested: Callable[[], object]) -> World:
        channel = self._channel or self._connect(stop_requested)
        listener = listen()
        with suppress(OSError):  # the host is lost, which the thread that listens to it notices
            channel.send({"offer": [_own_name(), workers, restart, listener.getsockname()[1]]})
        try:
            self._number, self.agreed, *facts = self._wait_for_world(stop_requested)
        except (Interrupted, NodesUnreachableError):
            listener.close()
            raise
        return _make_world(listener, *facts)

    def _wait_for_world(self, stop_requested: Callable[[], object]) -> list[Any]:
        while True:
            with suppress(Empty):
                if world := self._worlds.get(timeout=POLL_INTERVAL_SECONDS):
                    return world
                if self._ended.is_set():
                    raise NodesUnreachableError(f"the run at {self._where} has ended on another node")
                if not self._is_trusted:
                    raise NodesUnreachableError(
                        f"{self._where} was not answered by a launcher that holds our token.\n"
                        "  set launch.token_file= to a file with the same secret on all nodes"
                    )
                raise NodesUnreachableError(f"{self._where}: the node that decides is lost")
            if stop_requested():
                raise Interrupted

    def _connect(self, stop_requested: Callable[[], object]) -> Channel:
        if self._ended.is_set():
            raise NodesUnreachableError(f"the run at {self._where} has ended on another node")
        patience = RECONNECT_TIMEOUT_SECONDS if self._number else JOIN_TIMEOUT_SECONDS
        error = connection_error(self._host, self._port, patience, stop_requested)
        if stop_requested():
            raise Interrupted
        if error:
            raise NodesUnreachableError(f"{self._where}: no answer for {patience} s ({error})")
        try:
            connection = socket.create_connection((self._host, self._port), RECONNECT_TIMEOUT_SECONDS)
            channel = Channel(connection, self.token, is_caller=True)
        except OSError as lost:
            raise NodesUnreachableError(f"{self._where}: {lost.strerror or lost}") from lost
        self._channel, self._worlds, self._is_trusted = channel, SimpleQueue(), False
        Thread(target=self._listen, args=(channel, self._worlds), daemon=True).start()
        Thread(target=self._beat, args=(channel,), daemon=True).start()
        return channel

    def announce_restart(self) -> None:
        self._tell({"restart": self._number})

    def membership_changed(self, patience: float = 0) -> bool:
        return self._changed.wait(patience)

    def close(self) -> None:
        """End the run for all nodes."""
        self._tell({"left": True})
        self._ended.wait(FAREWELL_SECONDS if self._number and self._channel else 0)
        if channel := self._channel:
            channel.close()

    def _tell(self, message: Message) -> None:
        if channel := self._channel:
            with suppress(OSError):  # the host is lost, which the thread that listens to it notices
                channel.send(message)

    def _listen(self, channel: Channel, worlds: SimpleQueue[list[Any] | None]) -> None:
        """Take the messages of the host until it is lost."""
        number = 0
        try:
            while True:
                message, self._is_trusted = channel.receive(), True
                match message:
                    case {"world": [number, *_]}:
                        self._changed.clear()
                        worlds.put(message["world"])
                    case {"restart": restarted} if restarted == number:
                        self._changed.set()
                    case {"left": True}:
                        self._ended.set()
                    case _:
                        pass
        except OSError:
            self._channel = None
            channel.close()
            worlds.put(None)
            if not self._ended.is_set():
                self._changed.set()

    def _beat(self, channel: Channel) -> None:
        with suppress(OSError):
            while True:
                channel.send({"beat": True})
                time.sleep(HEARTBEAT_INTERVAL_SECONDS)


def _own_name() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _make_world(listener: socket.socket, node: int, workers: list[int], host: str, port: int, restart: int) -> World:
    """Return a world. The listener is closed if rank 0 is on another node."""
    if node:
        listener.close()
    return World(node, tuple(workers), host, port, restart, None if node else listener)


@contextmanager
def open_rendezvous(
    nodes: int | tuple[int, int],
    endpoint: str | None,
    token_file: str | None,
    agree: Callable[[World], str],
    stop_requested: Callable[[], object],
) -> Iterator[Rendezvous]:
    """Open the rendezvous of the nodes of a run, and close it with the block.

    Args:
        nodes: how many, or the smallest and the largest number
        endpoint: host:port of one of them, which decides; not needed for a single node
        token_file: see `find_token`; not needed for a single node
        agree: makes the text on which all nodes agree; called on one of them, with the first world
        stop_requested: whether this process was asked to stop

    Raises:
        ValueError: the endpoint is not host:port, or there is no token
        Interrupted: this process was asked to stop while it waited for the endpoint
        NodesUnreachableError: the endpoint has not answered
    """
    min_nodes, max_nodes = (nodes, nodes) if isinstance(nodes, int) else nodes
    if max_nodes == 1:
        with closing(SingleNode(draw_token(), agree)) as rendezvous:
            yield rendezvous
        return
    host, port = parse_endpoint(endpoint)
    token, listener = find_token(token_file), None
    if is_local_host(host):
        try:
            listener = listen(port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # otherwise another launcher on this machine was first
                raise ValueError(f"launch.rdzv_endpoint={endpoint}: {error.strerror}\n  choose another port") from error
    if listener:
        rendezvous = HostRendezvous(listener, host, token, (min_nodes, max_nodes), agree)
    else:
        rendezvous = MemberRendezvous(host, port, token)
    with closing(rendezvous):
        yield rendezvous
