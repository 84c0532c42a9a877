"""The coordinator's end of the links: a gRPC server whose clients must show a member's certificate."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import field
from functools import partial
from time import sleep
from typing import Annotated, Any, Protocol

import grpc
from pydantic import Field
from pydantic.dataclasses import dataclass

from trainer.federation.certificates import Credentials
from trainer.federation.link import CHANNEL_OPTIONS, SERVICE, WINDOW, WINDOW_BYTES
from trainer.federation.messages import (
    HEADER,
    Limit,
    Message,
    MessageError,
    MessageReader,
    Sums,
    parse_first_part,
    parse_header,
    read_parts,
)
from trainer.federation.probe import Probes
from trainer.federation.registry import POLL_SECONDS, BusyError, NotJoinedError, OverError, RefusedError, Registry
from trainer.federation.spool import KEY

MAX_STREAMS = 4  # of a member at once: it needs its presence, a meeting, and those of a link that has just broken
SPARE_THREADS = 4  # that refuse the streams beyond
# Strangers reach neither a thread nor a handler. These bound what they take of the process: open files and memory.
HANDSHAKE_MS = 5000
SPARE_CONNECTIONS = 256  # beyond those of the members
WINDOWS_BYTES, LEAST_WINDOW_BYTES = 64 << 20, 1 << 20  # of all members together, and of each

SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),  # otherwise a second coordinator at the same port would get some of the calls
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    ("grpc.max_concurrent_streams", 2 * MAX_STREAMS),  # of a connection
)

STATUSES = {
    RefusedError: grpc.StatusCode.FAILED_PRECONDITION,
    MessageError: grpc.StatusCode.INVALID_ARGUMENT,
    NotJoinedError: grpc.StatusCode.UNAVAILABLE,
    BusyError: grpc.StatusCode.UNAVAILABLE,
    OverError: grpc.StatusCode.OUT_OF_RANGE,
}


Key = Annotated[str, Field(max_length=200, pattern=f"^{KEY.pattern}$")]
Rounds = Annotated[int, Field(ge=0, lt=1 << 31)]
Session = Annotated[str, Field(min_length=1, max_length=64)]


@dataclass(frozen=True, config=HEADER)
class Arriving:
    """The part of the header of a member that joins which any federation has.

    Attributes:
        session: of the member's launch.
    """

    session: Session


@dataclass(frozen=True, config=HEADER)
class Bringing:
    """The header of a message to a meeting.

    Attributes:
        session: of the member's launch.
        key: of the meeting.
        saved: the number of rounds of the checkpoint from which the member would resume.
        sums: the member's scalars.
    """

    session: Session
    key: Key
    saved: Rounds = 0
    sums: Sums = field(default_factory=dict)


@dataclass(frozen=True, config=HEADER)
class Asking:
    """The header of a question for the newest state.

    Attributes:
        session: of the member's launch.
        rounds: the number of rounds that the member has done.
    """

    session: Session
    rounds: Rounds


class Admission(Protocol):
    """Who may join."""

    def admit(self, name: str, header: Mapping[str, Any]) -> None:
        """Check what a member says of itself; raise RefusedError with the reason why it cannot join."""
        ...

    def welcome(self) -> Message | None:
        """Return what a member that has joined needs to know; None as long as others are missing."""
        ...


class Traffic:
    """Bytes by member, counted while they pass."""

    def __init__(self):
        self._bytes: Counter[str] = Counter()
        self._changing = threading.Lock()

    def passing(self, name: str, parts: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the parts, and count them."""
        for part in parts:
            with self._changing:
                self._bytes[name] += len(part)
            yield part

    def of(self, name: str) -> int:
        """Return the number of bytes of a member."""
        return self._bytes[name]


class Server:
    """Answers members. Each stream of a member holds a thread; a member has a few, and cannot take those of others.

    Args:
        listen: host:port; port 0 is a free one.
        credentials: of the coordinator.
        registry: the members.
        admission: decides who may join.

    Attributes:
        port: where it listens.
        streams: how many are answered now, by member.
        received: counts the bytes of what members have sent.
        sent: counts the bytes of what they were answered.

    Raises:
        ValueError: the address cannot be had.
    """

    def __init__(self, listen: str, credentials: Credentials, registry: Registry, admission: Admission):
        self.registry, self.admission, self.probes = registry, admission, Probes()
        self.received, self.sent = Traffic(), Traffic()
        members = len(registry.members)
        pool = ThreadPoolExecutor(SPARE_THREADS + MAX_STREAMS * members, "link")
        connections = ("grpc.max_allowed_incoming_connections", SPARE_CONNECTIONS + 2 * members)
        # What is sent faster than it is written to the spool waits in memory, up to a window for each member.
        window = (WINDOW, min(WINDOW_BYTES, max(WINDOWS_BYTES // members, LEAST_WINDOW_BYTES)))
        self.server = grpc.server(pool, options=(*SERVER_OPTIONS, connections, window))
        self.streams: Counter[str] = Counter()
        self._lock = threading.Lock()
        methods = {"Join": self._join, "Meet": self._meet, "Fetch": self._fetch, "Probe": self._probe}
        handlers = {
            name: grpc.stream_stream_rpc_method_handler(self._answering(handle)) for name, handle in methods.items()
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        pair = [(credentials.key, credentials.certificate)]
        ssl = grpc.ssl_server_credentials(pair, credentials.authority, require_client_auth=True)
        try:
            self.port = self.server.add_secure_port(listen, ssl)
        except RuntimeError as error:
            raise ValueError(
                f"site.listen={listen} cannot be had\n  valid: an address and port of this host"
            ) from error
        self.server.start()

    def stop(self, grace: float = 1.0) -> None:
        """Answer what is under way, then hang up."""
        self.server.stop(grace).wait()

    def _answering(self, handle: Callable[[str, Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]) -> Any:
        """Return a handler that knows the caller's name, and answers errors with their sentence."""

        def answer(parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            names: list[bytes] = [*map(bytes, context.auth_context().get("x509_common_name", []))]
            name = names[0].decode(errors="replace") if len(names) == 1 else ""
            context.add_callback(partial(self.registry.wake, name))
            try:
                with self._admitted(name):
                    yield from self.sent.passing(name, handle(name, self.received.passing(name, parts), context))
            except tuple(STATUSES) as error:
                context.abort(STATUSES[type(error)], str(error))

        return answer

    @contextmanager
    def _admitted(self, name: str) -> Iterator[None]:
        """Count a stream while it is answered; refuse those of strangers, and those beyond a member's share."""
        self.registry.check_member(name)
        with self._lock:
            if self.streams[name] >= MAX_STREAMS:
                raise BusyError(f"{name} has {MAX_STREAMS} streams already")
            self.streams[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self.streams[name] -= 1

    def _join(self, name: str, parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        header = dict(self._read(parts).header)
        session = parse_header(Arriving, {"session": header.pop("session", None)}).session
        self.admission.admit(name, header)
        self.registry.enter(name, session, context.is_active)
        try:
            context.send_initial_metadata(())  # tells the member that it is present
            while (welcome := self.admission.welcome()) is None:
                if not context.is_active():
                    return
                sleep(POLL_SECONDS)
            yield from welcome.parts()
            yield b""  # it is whole
            left = threading.Event()
            if context.add_callback(left.set):
                left.wait()
        finally:
            self.registry.leave(name, session)

    def _meet(self, name: str, parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        first = next(parts, b"")
        header = parse_header(Bringing, parse_first_part(first)[0])
        self.registry.check(name, header.session)
        key = header.key
        limit = self.registry.wait_open(name, key, header.saved, context.is_active)
        if limit:
            with self.registry.spool.receiving(key, name) as file:
                reader = MessageReader(limit, file)
                reader.add(first)
                for part in parts:
                    reader.add(part)
                reader.finish()
            self.registry.bring(name, key)
        result = self.registry.result(name, key, context.is_active)
        if result:
            yield from read_parts(result)

    def _fetch(self, name: str, parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        header = parse_header(Asking, self._read(parts).header)
        self.registry.check(name, header.session)
        state = self.registry.newest(name, header.rounds, context.is_active)
        yield from read_parts(state) if state else Message({}).parts()

    def _probe(self, name: str, parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from self.probes.answer(parts, context.cancel)

    @staticmethod
    def _read(parts: Iterator[bytes]) -> Message:
        """Return a message without tensors."""
        reader = MessageReader(Limit())
        for part in parts:
            reader.add(part)
        return reader.finish()
