"""A site's link to the coordinator: it dials out, over mutual TLS, and tries again when the link breaks."""

from __future__ import annotations

import logging
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeVar

import grpc

from trainer.federation.certificates import Credentials
from trainer.federation.messages import Limit, Message, MessageError, MessageReader
from trainer.federation.options import COORDINATOR
from trainer.federation.registry import POLL_SECONDS

log = logging.getLogger(__name__)

T = TypeVar("T")

SERVICE = "silotrain.Federation"
JOIN, MEET, FETCH, PROBE = (f"/{SERVICE}/{name}" for name in ("Join", "Meet", "Fetch", "Probe"))
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between two tries
# After these the link is tried again; any other status is an answer.
BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)

WINDOW, WINDOW_BYTES = "grpc.http2.lookahead_bytes", 8 << 20  # of a stream: enough for 1 Gbit/s over 67 ms

# Both ends. A peer that has fallen silent is noticed by its pings: the keepalive options alone do not end a connection
# whose socket still takes bytes, ping_timeout_ms does.
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", 2 << 20),
    # Tensors do not compress. Frames of 16 KiB, and windows that gRPC lets grow, cost a fifth more of processor.
    ("grpc.per_message_compression", 0),
    ("grpc.per_message_decompression", 0),
    ("grpc.http2.max_frame_size", 1 << 20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.initial_reconnect_backoff_ms", int(FIRST_PAUSE * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(LONGEST_PAUSE * 1000)),
    ("grpc.enable_retries", 0),
)


# Sentences for a member whose connection is not made, by gRPC's words for it. The first that matches is taken.
REASONS = {
    "Hostname Verification": "the certificate there is not the coordinator's: another member or program has this port",
    "certificate has expired": "the coordinator's certificate has expired",
    "certificate is not yet valid": "the coordinator's certificate is not valid yet, by this clock",
    "CERTIFICATE_VERIFY_FAILED": "the certificate there is of another authority than ca.pem",
    "WRONG_VERSION_NUMBER": "it answers in plain text: another program has this port",
    "Connection refused": "nothing listens there",
    "Socket closed": "it hangs up. It may not take this site's certificate: of another authority, or of another time",
}


class LinkRefusedError(ValueError):
    """The coordinator refuses: the sentence is its own."""


class LinkLostError(Exception):
    """The coordinator could not be reached for as long as the site tries."""


class StoppedError(LinkLostError):
    """This process is asked to stop, and waits for the coordinator no more."""


class BehindError(Exception):
    """A meeting is over, and its result is kept no more."""


class Link:
    """A member's link to the coordinator.

    Args:
        server: host:port.
        credentials: of this member.
        retry_seconds: how long it tries before it gives up.
        is_stopping: ends every wait.

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
        options = (*CHANNEL_OPTIONS, (WINDOW, WINDOW_BYTES), ("grpc.ssl_target_name_override", COORDINATOR))
        self.channel = grpc.secure_channel(server, ssl, options)
        self._changed = threading.Condition()
        self._welcome: Message | None = None
        self._refused: LinkRefusedError | None = None
        self._is_present = self._is_closed = False
        self._trouble = ""  # why the last try has failed
        self._absent_since = monotonic()

    @contextmanager
    def joined(self, header: Mapping[str, Any]) -> Iterator[Message]:
        """Be present at the coordinator while the block runs; yield its welcome.

        Presence is a stream that stays open. When it breaks, the site joins again.

        Args:
            header: what this site says of itself.

        Raises:
            LinkRefusedError: the coordinator refuses this site.
            LinkLostError: it could not be reached for `retry_seconds`; StoppedError if this process is asked to stop.
        """
        message = Message({**header, "session": self.session})
        thread = threading.Thread(target=self._keep_joined, args=(message,), name="presence", daemon=True)
        thread.start()
        try:
            yield self._wait_welcome()
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
            self.channel.close()
            thread.join()

    def meet(self, message: Message, limit: Limit) -> Message:
        """Bring a message to a meeting, and return its result; send it again until that has come.

        Args:
            message: has the meeting's `key` in its header.
            limit: of the result.

        Raises:
            LinkRefusedError: the coordinator refuses it.
            LinkLostError: it could not be reached for `retry_seconds`; StoppedError if this process is asked to stop.
            BehindError: the meeting is over, and its result is kept no more.
        """
        return self._retry(MEET, message, limit)

    def fetch(self, message: Message, limit: Limit) -> Message:
        """Return the answer to a question; see `meet`."""
        return self._retry(FETCH, message, limit)

    def _wait_welcome(self) -> Message:
        told = ""
        with self._changed:
            while self._welcome is None:
                if self._refused:
                    raise self._refused
                if self.is_stopping():
                    raise StoppedError("this process is asked to stop")
                if self._has_lost:
                    raise LinkLostError(f"{self.server} cannot be reached: {self._trouble}")
                if self._trouble and not self._is_present and self._trouble != told:
                    told = self._trouble
                    message = f"{self.server} cannot be reached: {told}; tries for {self.retry_seconds:g} s"
                    print(message, file=sys.stderr, flush=True)
                self._changed.wait(POLL_SECONDS)
            return self._welcome

    @property
    def _has_lost(self) -> bool:
        """Whether this site has been absent for longer than it tries."""
        return not self._is_present and monotonic() - self._absent_since >= self.retry_seconds

    def _keep_joined(self, message: Message) -> None:
        pause = FIRST_PAUSE
        while not self._is_closed:
            try:
                self._join(message)
                pause = FIRST_PAUSE
            except MessageError as error:
                self._note(refused=_nonsense(error))
                return
            except (grpc.RpcError, ValueError) as error:  # ValueError: of a channel that is closed
                status: Any = error
                if isinstance(error, grpc.RpcError) and status.code() not in BROKEN:
                    self._note(refused=LinkRefusedError(status.details()))
                    return
                log.info("the presence at %s ended: %s", self.server, _reason(error))
                self._trouble = _reason(error)
            self._note(is_present=False)
            with self._changed:
                self._changed.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _join(self, message: Message) -> None:
        """Hold the stream open, by which the coordinator knows that this member is there, until it breaks."""
        call = self.channel.stream_stream(JOIN)(message.parts())
        call.initial_metadata()  # waits for it, or for the end of a call that has failed
        if call.is_active():
            self._note(is_present=True)
        reader = MessageReader(Limit())
        for part in call:
            if part:
                reader.add(part)
            else:  # the welcome is whole
                self._note(welcome=reader.finish())

    def _note(
        self,
        is_present: bool | None = None,
        welcome: Message | None = None,
        refused: LinkRefusedError | None = None,
    ) -> None:
        with self._changed:
            if self._is_present and is_present is False:
                self._absent_since = monotonic()
            self._is_present = self._is_present if is_present is None else is_present
            self._welcome = self._welcome or welcome
            self._refused = self._refused or refused
            self._changed.notify_all()

    def _exchange(self, method: str, message: Message, limit: Limit) -> Message:
        reader = MessageReader(limit)
        call = self.channel.stream_stream(method)(message.parts())
        ended = threading.Event()
        call.add_callback(ended.set)
        threading.Thread(target=self._cancel_when_stopping, args=(call, ended), daemon=True).start()
        try:
            for part in call:
                reader.add(part)
            return reader.finish()
        except MessageError as error:
            raise _nonsense(error) from error
        finally:
            ended.set()

    def _cancel_when_stopping(self, call: grpc.Call, ended: threading.Event) -> None:
        while not ended.wait(POLL_SECONDS):
            if self.is_stopping():
                call.cancel()

    def _retry(self, method: str, message: Message, limit: Limit) -> Message:
        pause = FIRST_PAUSE
        message = Message({**message.header, "session": self.session}, message.tensors)
        while True:
            if self._refused:
                raise self._refused
            try:
                return self._exchange(method, message, limit)
            except grpc.RpcError as error:
                status: Any = error
                if status.code() is grpc.StatusCode.OUT_OF_RANGE:
                    raise BehindError(status.details()) from error
                if status.code() not in BROKEN:
                    raise LinkRefusedError(status.details()) from error
                if self.is_stopping():
                    raise StoppedError("this process is asked to stop") from error
                if self._has_lost:
                    raise LinkLostError(f"{self.server} cannot be reached: {_reason(error)}") from error
                log.info("%s cannot be reached, tries again: %s", self.server, _reason(error))
            with self._changed:
                self._changed.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def _nonsense(error: MessageError) -> LinkRefusedError:
    return LinkRefusedError(f"the coordinator answers with something else than is expected: {error}")


def _reason(error: Exception) -> str:
    details = str(error.details()) if isinstance(error, grpc.Call) else str(error)
    return next((reason for text, reason in REASONS.items() if text in details), details)
