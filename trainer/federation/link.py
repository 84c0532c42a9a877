"""A site's link to the coordinator: it dials out, over mutual TLS, and tries again when the link breaks."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeVar

import grpc

from trainer.federation.certificates import Credentials
from trainer.federation.messages import Message, MessageReader

log = logging.getLogger(__name__)

T = TypeVar("T")

COORDINATOR = "coordinator"  # the name in its certificate, whatever host it is on
SERVICE = "silotrain.Federation"
JOIN, WATCH, MEET = (f"/{SERVICE}/{name}" for name in ("Join", "Watch", "Meet"))
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between two tries
# After these the link is tried again; any other status is an answer.
BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)

# Both ends. A peer that has fallen silent is noticed by its pings: the keepalive options alone do not end a connection
# whose socket still takes bytes, ping_timeout_ms does.
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", 2 << 20),
    ("grpc.enable_retries", 0),
)


class LinkRefusedError(ValueError):
    """The coordinator refuses: the sentence is its own."""


class LinkLostError(Exception):
    """The coordinator could not be reached for as long as the site tries."""


class Link:
    """A member's link to the coordinator.

    Args:
        server: host:port.
        credentials: of this member.
        retry_seconds: how long it tries before it gives up.
        is_stopping: ends the tries at once.

    Attributes:
        session: identifies this launch, so that a second one under the same name is noticed.
    """

    def __init__(
        self,
        server: str,
        credentials: Credentials,
        retry_seconds: float,
        is_stopping: Callable[[], bool] = lambda: False,
    ):
        self.server, self.retry_seconds, self.is_stopping = server, retry_seconds, is_stopping
        self.session = uuid.uuid4().hex
        ssl = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
        options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", COORDINATOR))
        self.channel = grpc.secure_channel(server, ssl, options)
        self._closed = threading.Event()

    def close(self) -> None:
        """Hang up."""
        self._closed.set()
        self.channel.close()

    def join(self, header: dict[str, Any]) -> Message:
        """Introduce this launch; return the coordinator's answer."""
        call = self.channel.stream_stream(JOIN)
        return self._retry(lambda: self._exchange(call, Message({**header, "session": self.session}), 0))

    def meet(self, message: Message, max_bytes: int) -> Message:
        """Bring a message to a meeting, and return its result; send it again until that has come.

        Args:
            message: has the meeting's `key` in its header.
            max_bytes: of the tensors of the result.

        Raises:
            LinkRefusedError: the coordinator refuses it.
            LinkLostError: the coordinator could not be reached for `retry_seconds`.
        """
        call = self.channel.stream_stream(MEET)
        return self._retry(lambda: self._exchange(call, message, max_bytes))

    @contextmanager
    def present(self) -> Iterator[None]:
        """Be counted as present by the coordinator while the block runs."""
        thread = threading.Thread(target=self._watch, name="presence", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.close()
            thread.join()

    def _watch(self) -> None:
        """Hold a stream open, by which the coordinator knows that this member is there."""
        call = self.channel.unary_stream(WATCH)
        while not self._closed.is_set():
            try:
                for _ in call(self.session.encode(), wait_for_ready=True):
                    pass
            except (grpc.RpcError, ValueError) as error:  # ValueError: of a channel that is closed
                log.info("the presence at %s ended: %s", self.server, _reason(error))
            self._closed.wait(FIRST_PAUSE)

    def _exchange(self, call: Any, message: Message, max_bytes: int) -> Message:
        reader = MessageReader(max_bytes)
        for part in call(message.parts()):
            reader.add(part)
        return reader.finish()

    def _retry(self, attempt: Callable[[], T]) -> T:
        began, pause = monotonic(), FIRST_PAUSE
        while True:
            try:
                return attempt()
            except grpc.RpcError as error:
                status: Any = error
                if status.code() not in BROKEN:
                    raise LinkRefusedError(status.details()) from error
                if self.is_stopping() or monotonic() - began >= self.retry_seconds:
                    raise LinkLostError(f"{self.server} cannot be reached: {_reason(error)}") from error
                log.info("%s cannot be reached, tries again: %s", self.server, _reason(error))
            self._closed.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def _reason(error: Exception) -> str:
    return str(error.details()) if isinstance(error, grpc.Call) else str(error)
