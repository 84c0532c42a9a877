"""Connections that never send a whole request, and many of them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.exported import write_linear
from tests.support.serving import serving
from trainer.service import connections
from trainer.service.request_memory import BODIES
from trainer.service.server import Server
from trainer.service.version import EXAMPLE_REQUEST

UNREAD, UNREAD_BYTES = 20, 100_000_000  # connections, and what they may take
SILENT = 300


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(connections, "LOOK_SECONDS", 0.1)
    write_linear(tmp_path / "linear", 1)
    with serving(tmp_path) as server:
        yield server


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.http_port), timeout=20)


def read(connection: socket.socket) -> str:
    """Return all that comes until the connection is closed."""
    parts = []
    try:
        while part := connection.recv(4096):
            parts.append(part)
    except ConnectionResetError:  # more has arrived than the server has read
        pass
    return b"".join(parts).decode()


BEGUN = ["", "GET /v2 HT", "POST /v2/models/linear/infer HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"]


@pytest.mark.parametrize("begun", BEGUN)
def test_a_request_that_does_not_arrive_is_refused(server: Server, begun: str) -> None:
    with connect(server) as connection:
        connection.sendall(begun.encode())
        answer = read(connection)
    assert answer.startswith("HTTP/1.1 408 ") and "within" in answer


@pytest.mark.parametrize("endless", [b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * 100_000, b"GET /" + b"a" * 600_000])
def test_a_head_without_an_end_is_refused(server: Server, endless: bytes) -> None:
    with connect(server) as connection:
        try:
            connection.sendall(endless)
        except (BrokenPipeError, ConnectionResetError):  # the server does not read it to its end
            return
        answer = read(connection)
    assert not answer or answer.startswith(("HTTP/1.1 431 ", "HTTP/1.1 400 "))


def test_silent_connections_leave_the_others_alone(server: Server, tmp_path: Path) -> None:
    request = (tmp_path / "linear" / "1" / EXAMPLE_REQUEST).read_bytes()
    with httpx.Client(base_url=server.http_url) as client, ExitStack() as stack:
        for _ in range(SILENT):
            stack.enter_context(connect(server))
        for _ in range(3):
            assert client.post("/v2/models/linear/infer", content=request).status_code == 200


def test_clients_that_read_no_answers_leave_the_others_alone(server: Server, tmp_path: Path) -> None:
    """They send requests until nothing more is taken from them: what waits for them in memory is bounded."""
    request = (tmp_path / "linear" / "1" / EXAMPLE_REQUEST).read_bytes()
    head = f"POST /v2/models/linear/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(request)}\r\n\r\n"
    many = (head.encode() + request) * 200
    before = psutil.Process().memory_info().rss
    with httpx.Client(base_url=server.http_url) as client, ExitStack() as stack:
        for _ in range(UNREAD):
            connection = stack.enter_context(connect(server))
            connection.setblocking(False)
            with suppress(BlockingIOError, ConnectionResetError):  # the server may hang up
                for _ in range(100):
                    connection.send(many)
        for _ in range(3):
            assert client.post("/v2/models/linear/infer", content=request).status_code == 200
        assert psutil.Process().memory_info().rss - before < UNREAD_BYTES


def test_bodies_that_arrive_together_are_bounded_together(tmp_path: Path) -> None:
    """Each is within its own limit; the one that would be too much is refused, and others are answered afterwards."""
    write_linear(tmp_path / "linear", 1)
    request = (tmp_path / "linear" / "1" / EXAMPLE_REQUEST).read_bytes()
    size = 100_000
    head = f"POST /v2/models/linear/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {size + 1}\r\n\r\n".encode()
    with serving(tmp_path, max_body=size + 1) as server:
        memory = server.service.memory
        with ExitStack() as stack:
            for _ in range(BODIES):
                stack.enter_context(connect(server)).sendall(head + b" " * size)
            wait_until(lambda: memory.held == BODIES * size)
            with httpx.Client(base_url=server.http_url) as client:
                answer = client.post("/v2/models/linear/infer", content=b" " * size)
                assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
                assert answer.json()["error"].startswith(f"memory: got {(BODIES + 1) * size} bytes of all requests")
        wait_until(lambda: memory.held == 0)
        with httpx.Client(base_url=server.http_url) as client:
            assert client.post("/v2/models/linear/infer", content=request).status_code == 200
        assert memory.held == 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
