"""The network of a host: its interfaces, and the reachability and clocks of other nodes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import NamedTuple

import psutil

LOOPBACK = "127."

CONNECT_TIMEOUT_SECONDS = 3
PINGS = 8  # the fastest of which determines the clock offset
MAX_CONCURRENT_PINGS = 32


class Interface(NamedTuple):
    """A network interface and its IPv4 address."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        return self.address.startswith(LOOPBACK)


def list_interfaces() -> list[Interface]:
    """Return the interfaces that have an IPv4 address."""
    return [
        Interface(name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]


def gloo_interface() -> Interface:
    """Return the interface that gloo would use.

    It is that of GLOO_SOCKET_IFNAME, else of the address of the host's name, else the loopback.

    Raises:
        ValueError: GLOO_SOCKET_IFNAME names an interface that this host does not have.
    """
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not wanted:
        return _interface_of(_host_address())
    interfaces = list_interfaces()
    found = next((interface for interface in interfaces if interface.name == wanted), None)
    if found is None:
        names = ", ".join(interface.name for interface in interfaces)
        raise ValueError(f"GLOO_SOCKET_IFNAME={wanted}: {socket.gethostname()} has none\n  valid on that host: {names}")
    return found


def interface_towards(host: str | None) -> str:
    """Return the name of the interface on the route to another host, or of any other that is no loopback.

    Empty if there is none.
    """
    found = ""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect((host or "", 9))  # chooses a route and sends nothing
        found = udp.getsockname()[0]
    others = [interface for interface in list_interfaces() if not interface.is_loopback]
    return next((name for name, address in others if address == found), others[0].name if others else "")


def _host_address() -> str:
    """Return the first address of the host's name on which a socket can be bound."""
    answers = []
    with suppress(OSError):
        answers = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
    for *_, address in answers:
        with suppress(OSError), socket.socket() as candidate:
            candidate.bind((address[0], 0))
            return str(address[0])
    return "127.0.0.1"


def _interface_of(address: str) -> Interface:
    """Return the interface that has this address; other loopback addresses are of the loopback too."""
    interfaces = list_interfaces()
    same = [interface for interface in interfaces if interface.address == address]
    if not same and address.startswith(LOOPBACK):
        same = [interface for interface in interfaces if interface.is_loopback]
    return Interface(same[0].name if same else "?", address)


class PingResult(NamedTuple):
    """Result of a ping: an error, or how far the node's clock is ahead, in seconds."""

    node: int
    error: str
    clock_offset: float


class _PingServer(ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128


def serve_pings(address: str, node: int) -> int:
    """Answer pings with the node's number and time until the process ends.

    Returns the port.
    """

    class Reply(StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline():
                self.wfile.write(f"{node} {time.time()}\n".encode())

    server = _PingServer((address, 0), Reply)
    Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


def ping_all(nodes: Mapping[int, Sequence[object]]) -> list[PingResult]:
    """Ping nodes concurrently.

    Args:
        nodes: address and port of each node, by its number.
    """
    with ThreadPoolExecutor(MAX_CONCURRENT_PINGS) as pool:
        return list(pool.map(lambda node: _ping(node, *nodes[node]), nodes))


def _ping(node: int, address: object, port: object) -> PingResult:
    """Ping a node several times. Its clock offset assumes that both ways take as long."""
    answers = []
    try:
        with socket.create_connection((str(address), int(str(port))), timeout=CONNECT_TIMEOUT_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            replies = connection.makefile()
            for _ in range(PINGS):
                sent = time.time()
                connection.sendall(b"?\n")
                replied_by, remote_time = replies.readline().split()
                received = time.time()
                answers.append((received - sent, float(remote_time) - (sent + received) / 2))
                if int(replied_by) != node:
                    return PingResult(node, "another node answers at this address", 0.0)
    except OSError as error:
        return PingResult(node, error.strerror or str(error), 0.0)
    except ValueError:
        return PingResult(node, "it does not answer as a node of this run", 0.0)
    return PingResult(node, "", min(answers)[1])
