"""Several processes that answer at the same ports, each with the models in its own memory."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trainer.commands.exit_codes import BAD_INPUT
from trainer.distributed.launch.processes import TRAINER
from trainer.distributed.launch.signals import handle_stop_signals
from trainer.distributed.launch.supervisor import supervise

WORKER = "SILOTRAIN_SERVER_WORKER"  # the number of this process among them
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's name: where they count
STOP_SECONDS = 35  # more than a server may take to answer what is in flight


def own_number() -> int | None:
    """Return the number of this process among its workers; None if it is not one of them."""
    number = os.environ.get(WORKER)
    return None if number is None else int(number)


def serve_by_workers(arguments: Sequence[str], workers: int, host: str, http: int, grpc: int) -> int:
    """Serve by several processes until a stop signal, and start those again that die. Return the exit code.

    The kernel gives each connection to one of them.

    Args:
        arguments: of each `python -m trainer serve`.
        workers: their number.
        host: address to listen at.
        http: port of REST; 0: any that is free.
        grpc: port of gRPC; 0: any that is free.

    Raises:
        ValueError: a port is taken.
    """
    with (
        _reserved("--http", host, http) as http_port,
        _reserved("--grpc", host, grpc) as grpc_port,
        tempfile.TemporaryDirectory(prefix="silotrain-metrics-") as metrics,
        handle_stop_signals() as signals,
    ):
        command = [*TRAINER, "serve", *arguments, "--http", str(http_port), "--grpc", str(grpc_port)]
        environments = [{WORKER: str(number), METRICS_FOLDER: metrics} for number in range(workers)]
        return supervise(command, environments, signals, STOP_SECONDS, BAD_INPUT)


@contextmanager
def _reserved(option: str, host: str, port: int) -> Iterator[int]:
    """Keep a port for the workers of this process, which listen at it; yield its number.

    Nothing listens at it here, so that no connection comes here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:  # alone: another server with workers may not have it
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
            tried.listen()
        except OSError as error:
            raise ValueError(
                f"{option} {port}: nothing can listen at {host}:{port}\n  choose a free port, or 0 for any"
            ) from error
        port = tried.getsockname()[1]
    with socket.socket(family) as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept.bind((host, port))
        yield port
