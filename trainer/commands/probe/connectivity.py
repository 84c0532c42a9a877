"""Who can reach whom, and what time it is there: each node listens at a port, and the first ranks of the others ask."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Thread
from typing import NamedTuple

CONNECT_TIMEOUT_SECONDS = 3
PINGS = 8  # of which the one answered soonest tells the time
MAX_AT_ONCE = 32


class PingResult(NamedTuple):
    """What came of asking a node: why it could not be reached, or how far its clock is ahead of ours, in seconds."""

    node: int
    error: str
    clock_offset: float


def serve_pings(address: str, node: int) -> int:
    """The port at which this node answers, until the process ends, with its number and the time."""
    server = socket.create_server((address, 0), backlog=128)

    def accept() -> None:
        while True:
            connection, _ = server.accept()
            Thread(target=_reply, args=(connection, node), daemon=True).start()

    Thread(target=accept, daemon=True).start()
    return server.getsockname()[1]


def ping_all(others: Mapping[int, Sequence[object]]) -> list[PingResult]:
    """What was heard of these nodes, {node: (address, port)}, all asked at once."""
    with ThreadPoolExecutor(MAX_AT_ONCE) as pool:
        return list(pool.map(lambda node: _ping(node, *others[node]), others))


def connection_error(host: str, port: int, patience: float) -> str:
    """Why nothing answers there in so many seconds; empty if something does."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_SECONDS).close()
            return ""
        except OSError as error:
            if time.monotonic() > deadline:
                return error.strerror or str(error)
        time.sleep(0.2)


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
        return PingResult(node, "another node answers there", 0.0)
    _, _, ahead = min(answers, key=lambda answer: answer[1])
    return PingResult(node, "", ahead)


def _ping_once(connection: socket.socket) -> tuple[int, float, float]:
    """Who answered, how long that took, and how far its clock is ahead, if the way there is as long as that back."""
    before = time.time()
    connection.sendall(b"?")
    answer = b""
    while not answer.endswith(b"\n"):
        if not (part := connection.recv(64)):
            raise ValueError("the connection was closed")
        answer += part
    after = time.time()
    who, there = answer.split()
    return int(who), after - before, float(there) - (before + after) / 2
