"""Connections that never send a whole request, and many of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.exported import write_linear
from tests.support.serving import serving
from trainer.service import connections
from trainer.service.server import Server
from trainer.service.version import EXAMPLE_REQUEST

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
