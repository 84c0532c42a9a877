"""The coordinator's end of the links: a gRPC server whose clients must show a member's certificate."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import sleep
from typing import Any, Protocol

import grpc

from trainer.federation.certificates import Credentials
from trainer.federation.link import CHANNEL_OPTIONS, SERVICE
from trainer.federation.messages import Message, MessageError, MessageReader, parse_first_part, read_parts
from trainer.federation.registry import POLL_SECONDS, NotJoinedError, OverError, RefusedError, Registry

STATUSES = {
    RefusedError: grpc.StatusCode.FAILED_PRECONDITION,
    MessageError: grpc.StatusCode.INVALID_ARGUMENT,
    NotJoinedError: grpc.StatusCode.UNAVAILABLE,
    OverError: grpc.StatusCode.OUT_OF_RANGE,
}


class Admission(Protocol):
    """Who may join."""

    def admit(self, name: str, header: Mapping[str, Any]) -> None:
        """Check what a member says of itself; raise RefusedError with the reason why it cannot join."""
        ...

    def welcome(self) -> Message | None:
        """Return what a member that has joined needs to know; None as long as others are missing."""
        ...


class Server:
    """Answers members. Each stream of a member holds a thread.

    Args:
        listen: host:port; port 0 is a free one.
        credentials: of the coordinator.
        registry: the members.
        admission: decides who may join.

    Attributes:
        port: where it listens.

    Raises:
        ValueError: the address cannot be had.
    """

    def __init__(self, listen: str, credentials: Credentials, registry: Registry, admission: Admission):
        self.registry, self.admission = registry, admission
        pool = ThreadPoolExecutor(4 + 3 * len(registry.members), "link")
        # Otherwise a second coordinator at the same port would get some of the calls.
        self.server = grpc.server(pool, options=(*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)))
        handlers = {
            name: grpc.stream_stream_rpc_method_handler(self._answering(handle))
            for name, handle in (("Join", self._join), ("Meet", self._meet), ("Fetch", self._fetch))
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
            names = context.auth_context().get("x509_common_name", [])
            name = str(names[0], "utf-8", "replace") if len(names) == 1 else ""
            context.add_callback(partial(self.registry.wake, name))
            try:
                yield from handle(name, parts, context)
            except tuple(STATUSES) as error:
                context.abort(STATUSES[type(error)], str(error))

        return answer

    def _join(self, name: str, parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        header = self._read(parts).header
        self.admission.admit(name, header)
        session = str(header.get("session"))
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
        header, _ = parse_first_part(first)
        self.registry.check(name, str(header.get("session")))
        key, saved = str(header.get("key")), header.get("saved", 0)
        max_bytes = self.registry.wait_open(name, key, saved, context.is_active)
        if max_bytes is not None:
            with self.registry.spool.receiving(key, name) as file:
                reader = MessageReader(max_bytes, file)
                reader.add(first)
                for part in parts:
                    reader.add(part)
                reader.finish()
            self.registry.bring(name, key)
        result = self.registry.result(name, key, context.is_active)
        if result:
            yield from read_parts(result)

    def _fetch(self, name: str, parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        header = self._read(parts).header
        self.registry.check(name, str(header.get("session")))
        state = self.registry.newest(name, int(header["rounds"]), context.is_active)
        yield from read_parts(state) if state else Message({}).parts()

    @staticmethod
    def _read(parts: Iterator[bytes]) -> Message:
        """Return a message without tensors."""
        reader = MessageReader(0)
        for part in parts:
            reader.add(part)
        return reader.finish()
