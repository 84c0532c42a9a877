"""The servers of a process: REST and gRPC over one repository, from the first version to the last request."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from trainer.service.batcher import Batcher
from trainer.service.connections import LimitedHttp
from trainer.service.meters import Meters
from trainer.service.repository import Repository
from trainer.service.request_memory import BODIES, RequestMemory
from trainer.service.rest import make_app
from trainer.service.rpc import make_server
from trainer.service.tls import ServerCertificates

DRAIN_SECONDS = 30  # for requests that are in flight when the server is stopped
BACKLOG = 2048

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """How models are served.

    Attributes:
        host: address to listen at.
        http: port of REST; 0: any that is free.
        grpc: port of gRPC; 0: any that is free.
        max_batch: rows of a batch.
        queue: requests that may queue for a model.
        threads: of an operation of a model; None: one for each core.
        max_body: bytes of a request.
        release: version of this software, for clients that ask for it.
        certificates: of TLS; None: plain text.
        worker: the number of this process among several at the same ports; None: it is alone.
    """

    host: str = "127.0.0.1"
    http: int = 8080
    grpc: int = 8081
    max_batch: int = 64
    queue: int = 1024
    threads: int | None = None
    max_body: int = 16_000_000
    release: str = "unknown"
    certificates: ServerCertificates | None = None
    worker: int | None = None


class InferenceService:
    """The models and the queues before them: what both protocols ask."""

    def __init__(self, root: Path, options: ServerOptions):
        self.max_body, self.release = options.max_body, options.release
        self.memory = RequestMemory(BODIES * options.max_body)
        self.meters = Meters(options.worker)
        self.repository = Repository(root, options.threads, self.meters)
        self.batcher = Batcher(options.max_batch, options.queue, self.meters)
        self.is_stopping = False

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here: there is a model, and the server is not about to end."""
        return bool(self.repository.models) and not self.is_stopping


class Server:
    """Serves a folder of models until it is stopped.

    Args:
        root: MODELS, one model in it, or one version of a model.
        options: how they are served.

    Attributes:
        service: answers the requests.
        http_port: of REST, once the server has started.
        grpc_port: of gRPC, once the server has started.
    """

    def __init__(self, root: Path, options: ServerOptions):
        self.service, self._root = InferenceService(root, options), root
        self.http_port = self.grpc_port = 0
        self._options, self._host = options, f"[{options.host}]" if ":" in options.host else options.host

    @property
    def http_url(self) -> str:
        """Where REST is served."""
        scheme = "https" if self._options.certificates else "http"
        return f"{scheme}://{self._host}:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        """Where gRPC is served."""
        return f"{self._host}:{self.grpc_port}"

    async def start(self) -> None:
        """Load the models and begin to answer.

        Raises:
            ValueError: a port is taken, or the folder has no model that is whole.
        """
        options, self._stop = self._options, asyncio.Event()
        self._loop = asyncio.get_running_loop()
        try:
            self.service.repository.refresh()
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error
        if not self.service.repository.models:
            raise ValueError(
                f"{self._root} has no model that is whole\n  valid: a folder MODELS/NAME/VERSION, by export"
            )
        listener = self._listen()
        self.http_port = listener.getsockname()[1]
        self._rpc = make_server(self.service, {"grpc.so_reuseport": int(options.worker is not None)})
        address, certificates = f"{self._host}:{options.grpc}", options.certificates
        try:
            if certificates:
                self.grpc_port = self._rpc.add_secure_port(address, certificates.grpc_credentials())
            else:
                self.grpc_port = self._rpc.add_insecure_port(address)
        except RuntimeError as error:
            listener.close()
            raise _taken("--grpc", options.host, options.grpc) from error
        await self._rpc.start()
        config = uvicorn.Config(
            make_app(self.service),
            lifespan="off",
            http=LimitedHttp,
            ws="none",
            ssl_context_factory=certificates and (lambda *_: certificates.ssl_context()),
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        self._http = _HttpServer(config)
        self._serving = asyncio.create_task(self._http.serve([listener]))
        self._following = asyncio.create_task(self.service.repository.follow())

    async def wait(self) -> None:
        """Answer until the server is stopped, then finish the requests that are in flight."""
        await self._stop.wait()
        self.service.is_stopping = True
        self._following.cancel()
        self._http.should_exit = True
        await asyncio.gather(self._rpc.stop(DRAIN_SECONDS), self._serving)
        self.service.batcher.close()

    def stop(self) -> None:
        """Have the server end. Any thread may call it."""
        with suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._stop.set)

    def _listen(self) -> socket.socket:
        host, port = self._options.host, self._options.http
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server(
                (host, port), family=family, backlog=BACKLOG, reuse_port=self._options.worker is not None
            )
        except OSError as error:
            raise _taken("--http", host, port) from error
        # Its connections have it too. Without it each answer, which is two packets, waits for the client's delayed ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener


class _HttpServer(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process that serves."""
        yield


def _taken(option: str, host: str, port: int) -> ValueError:
    return ValueError(f"{option} {port}: nothing can listen at {host}:{port}\n  choose a free port, or 0 for any")
