"""The coordinator's end of the links: a gRPC server whose clients must show a member's certificate."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grpc

from trainer.federation.certificates import Credentials
from trainer.federation.link import CHANNEL_OPTIONS, SERVICE
from trainer.federation.messages import Message, MessageError, MessageReader
from trainer.federation.registry import RefusedError, Registry


class Admission(Protocol):
    """Who may join, and how large a message may be."""

    def admit(self, name: str, header: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a member that joins; raise RefusedError with the reason."""
        ...

    def max_bytes(self, name: str) -> int:
        """Return how many bytes the tensors of a member's message may have."""
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
        self.server = grpc.server(pool, options=CHANNEL_OPTIONS)
        handlers = {
            "Join": grpc.stream_stream_rpc_method_handler(self._answering(self._join)),
            "Watch": grpc.unary_stream_rpc_method_handler(self._answering(self._watch)),
            "Meet": grpc.stream_stream_rpc_method_handler(self._answering(self._meet)),
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

    def _answering(self, handle: Callable[[str, Any, grpc.ServicerContext], Iterator[bytes]]) -> Any:
        """Return a handler that knows the caller's name, and answers errors with their sentence."""

        def answer(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            names = context.auth_context().get("x509_common_name", [])
            name = names[0].decode() if len(names) == 1 else ""
            try:
                yield from handle(name, request, context)
            except RefusedError as error:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            except MessageError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

        return answer

    def _join(self, name: str, parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        message = self._read(parts, 0)
        yield from Message(self.admission.admit(name, dict(message.header))).parts()

    def _watch(self, name: str, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        session = request.decode(errors="replace")
        self.registry.enter(name, session)
        try:
            yield b""  # tells the member that it is present
            left = threading.Event()
            if context.add_callback(left.set):
                left.wait()
        finally:
            self.registry.leave(name, session)

    def _meet(self, name: str, parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        message = self._read(parts, self.admission.max_bytes(name))
        key = str(message.header.get("key"))
        self.registry.bring(name, key, message)
        result = self.registry.result(name, key, context.is_active)
        if result is not None:
            yield from result.parts()
        elif context.is_active():
            raise RefusedError(f"{key} has ended without {name}")

    @staticmethod
    def _read(parts: Iterator[bytes], max_bytes: int) -> Message:
        reader = MessageReader(max_bytes)
        for part in parts:
            reader.add(part)
        return reader.finish()
