"""The servers of the benchmark as processes: ours, and those of others in environments of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PEERS = Path(__file__).parent / "peers"
READY_SECONDS = 120


@dataclass(frozen=True)
class Kind:
    """A server of the comparison.

    Attributes:
        name: in the tables.
        package: that its interpreter must have; empty for ours.
        script: of `peers/`, started with the folder of models and two ports.
        is_open_inference: whether it speaks the Open Inference Protocol, over gRPC too.
    """

    name: str
    package: str = ""
    script: str = ""
    is_open_inference: bool = True

    def path(self, model: str) -> str:
        """Return the path of requests."""
        return f"/v2/models/{model}/infer" if self.is_open_inference else f"/{model}"

    def body(self, request: dict[str, Any]) -> bytes:
        """Return a request of the protocol in the server's own JSON."""
        if self.is_open_inference:
            return json.dumps(request).encode()
        (tensor,) = request["inputs"]
        return json.dumps({"inputs": _nested(tensor["data"], tensor["shape"])}).encode()


OURS = Kind("silotrain")
OTHERS = (
    Kind("kserve SDK", "kserve", "kserve_sdk.py"),
    Kind("MLServer", "mlserver", "mlserver_runtime.py"),
    Kind("LitServe", "litserve", "litserve_api.py", is_open_inference=False),
    Kind("FastAPI by hand", "fastapi", "fastapi_by_hand.py", is_open_inference=False),
)


class Server:
    """A running server, which is stopped (SIGSTOP) while others are measured."""

    def __init__(self, kind: Kind, process: subprocess.Popen[bytes], http_port: int, grpc_port: int):
        self.kind, self.http_port, self.grpc_port = kind, http_port, grpc_port
        self._process = process

    def wait(self) -> None:
        """Wait until its ports are open."""
        deadline = time.monotonic() + READY_SECONDS
        for port in (self.http_port, self.grpc_port) if self.kind.is_open_inference else (self.http_port,):
            while not _is_open(port):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{self.kind.name} does not listen at port {port}; exit code {self._process.poll()}"
                    )
                time.sleep(0.1)

    def processor_seconds(self) -> float:
        """Return the processor time of its processes so far."""
        return sum(sum(each.cpu_times()[:2]) for each in self._tree())

    def megabytes(self) -> float:
        """Return the memory of its processes; shared pages are divided among them."""
        return sum(each.memory_full_info().pss for each in self._tree()) / 1e6

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        for each in self._tree():
            with suppress(psutil.NoSuchProcess):
                each.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]


@contextmanager
def start(kind: Kind, python: str, models: Path, log: Path, *options: str) -> Iterator[Server]:
    """Start a server with the models of a folder, and end it with the block.

    Args:
        kind: of the server.
        python: its interpreter.
        models: MODELS/<name>/1/model.onnx.
        log: the file of its output.
        options: of ours.
    """
    http_port, grpc_port = _free_port(), _free_port()
    ports = [str(http_port), str(grpc_port)]
    command = [python, str(PEERS / kind.script), str(models), *ports]
    environment = {**os.environ, "PYTHONPATH": str(PEERS)}
    if kind is OURS:
        command = [python, "-m", "trainer", "serve", str(models), "--http", ports[0], "--grpc", ports[1], *options]
        environment = {**os.environ}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    server = Server(kind, process, http_port, grpc_port)
    try:
        yield server
    finally:
        server.send(signal.SIGCONT)
        tree = server._tree()
        process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=15)
        for each in alive:
            each.kill()
        process.wait()


def interpreter_of(kind: Kind, interpreters: Sequence[str]) -> str | None:
    """Return the first interpreter that has the server's package."""
    if kind is OURS:
        return sys.executable
    looks = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({kind.package!r}) is None)"
    return next((each for each in interpreters if subprocess.run([each, "-c", looks]).returncode == 0), None)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _is_open(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def _nested(values: list[float], shape: Sequence[int]) -> Any:
    if len(shape) == 1:
        return values
    size = len(values) // shape[0]
    return [_nested(values[index * size : (index + 1) * size], shape[1:]) for index in range(shape[0])]
