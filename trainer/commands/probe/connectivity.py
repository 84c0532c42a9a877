"""Reachability and clocks of nodes.

Each node listens at a port, and the first ranks of the others ping it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Thread
from typing import NamedTuple

CONNECT_TIMEOUT_SECONDS = 3
PINGS = 8  # the fastest of which determines the clock offset
MAX_CONCURRENT_PINGS = 32


class PingResult(NamedTuple):
    """Result of a ping: an error, or how far the node's clock is ahead, in seconds."""

    node: int
    error: str
    clock_offset: float


def serve_pings(address: str, node: int) -> int:
    """Answer pings with the node's number and time until the process ends.

    Returns the port.
    """
    server = socket.create_server((address, 0), backlog=128)

    def accept() -> None:
        while True:
            connection, _ = server.accept()
            Thread(target=_reply, args=(connection, node), daemon=True).start()

    Thread(target=accept, daemon=True).start()
    return server.getsockname()[1]


def ping_all(nodes: Mapping[int, Sequence[object]]) -> list[PingResult]:
    """Ping nodes concurrently.

    Args:
        nodes: address and port of each node, by its number.
    """
    with ThreadPoolExecutor(MAX_CONCURRENT_PINGS) as pool:
        return list(pool.map(lambda node: _ping(node, *nodes[node]), nodes))


def _reply(connection: socket.socket, node: int) -> None:
    with connection, suppress(OSError):
        while connection.recv(1):
            connection.sendall(f"{node} {time.time()}\n".encode())


def _ping(node: int, address: object, port: object) -> PingResult:
    try:
        with socket.create_connection((str(address), int(str(port))), timeout=CONNECT_TIMEOUT_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = [_ping_once(connection) for _ in range(PINGS)]
    except (OSError, ValueError) as error:
        return PingResult(node, getattr(error, "strerror", None) or str(error), 0.0)
    if answers[0][0] != node:
        return PingResult(node, "another node answers at this address", 0.0)
    _, _, clock_offset = min(answers, key=lambda answer: answer[1])
    return PingResult(node, "", clock_offset)


def _ping_once(connection: socket.socket) -> tuple[int, float, float]:
    """Return the node that answers, the round-trip time, and its clock offset.

    The offset assumes that both ways take as long.
    """
    sent = time.time()
    connection.sendall(b"?")
    answer = b""
    while not answer.endswith(b"\n"):
        if not (part := connection.recv(64)):
            raise ValueError("the connection was closed")
        answer += part
    received = time.time()
    node, remote_time = answer.split()
    return int(node), received - sent, float(remote_time) - (sent + received) / 2
