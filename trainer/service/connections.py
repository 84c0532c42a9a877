"""Connections of HTTP, with limits for what comes before the application sees a request."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024  # of the line of a request and its headers
REQUEST_SECONDS = 60  # for a whole request to arrive, from the connection or its first byte on
LOOK_SECONDS = 5


class LimitedHttp(HttpToolsProtocol):
    """uvicorn's protocol. A request that never ends takes neither memory nor a connection for long."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._head_bytes, self._is_in_head = 0, True
        self._begun_at: float | None = self.loop.time()
        self.loop.call_later(LOOK_SECONDS, self._look)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                    f"head: got {self._head_bytes} bytes and no end, wanted at most {MAX_HEAD_BYTES}",
                )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes, self._is_in_head = 0, True
        self._begun_at = self.loop.time()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._begun_at = None
        super().on_message_complete()

    def _look(self) -> None:
        """Close the connection if a request has taken too long; look again later if not."""
        if self.transport.is_closing():
            return
        if self._begun_at is not None and self.loop.time() - self._begun_at > REQUEST_SECONDS:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"request: it has not arrived within {REQUEST_SECONDS} seconds")
        else:
            self.loop.call_later(LOOK_SECONDS, self._look)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer with an error, and close the connection."""
        body = json.dumps({"error": message}).encode()
        head = f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
