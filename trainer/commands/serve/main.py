"""`python -m trainer serve`: serves exported models over REST and gRPC until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import __version__
from trainer.commands.exit_codes import FINISHED
from trainer.commands.options import Parser
from trainer.commands.serve.exported_run import exported_models
from trainer.commands.serve.workers import own_number, serve_by_workers
from trainer.distributed.launch.signals import handle_stop_signals, hard_exit
from trainer.service.tls import ServerCertificates

if TYPE_CHECKING:
    from trainer.service.server import Server

MAX_FILES = 65_536  # that are open at once, where the system allows it

USAGE = """\
python -m trainer serve MODELS [OPTION ...]     answers requests for the models of a folder, over REST and gRPC
python -m trainer serve RUN [OPTION ...]        for the model of a run, which is exported into its folder first

MODELS holds what `export` writes, MODELS/NAME/VERSION/. One model in it, MODELS/NAME, or one version can be served
alone. The newest version of each model answers, and the one before it if it is asked for by number. A version that
comes later is checked, and takes over without a failed request. While RUN is trained, each new best round is one.
The protocol is the Open Inference Protocol, v2.

  --http PORT        of REST and of the metrics for Prometheus, at /metrics; default: 8080; 0: any that is free
  --grpc PORT        of gRPC, with its health and reflection services; default: 8081; 0: any that is free
  --host ADDRESS     to listen at; default: 127.0.0.1, which only this machine reaches; 0.0.0.0: all addresses
  --max-batch ROWS   examples that are computed together; default: 64
  --queue REQUESTS   that may wait for a model, before others are refused at once; default: 1024
  --threads N        of an operation of a model; default: auto, one for each core
  --max-body BYTES   of a request; default: 16000000
  --workers N        processes at the same ports, each with the models in its own memory; one that dies is started
                     again, while the others answer; default: 1
  --tls CERT KEY     files of a certificate and its key, in PEM: both ports speak TLS alone
  --ca CA            with --tls: clients need a certificate that one of the authorities in this file has signed

  python -m trainer serve models
  curl -d @models/digits/1/example.json http://127.0.0.1:8080/v2/models/digits/infer

SIGTERM or Control-C: requests in flight are finished, for at most 30 s; a second signal ends at once.
docs/serving.md explains it. Exit codes: 0 stopped, 2 bad input."""


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal comes, and return the exit code.

    Raises ValueError for bad input.
    """
    parser = Parser("python -m trainer serve")
    parser.add_argument("models", type=Path, metavar="MODELS|RUN")
    parser.add_argument("--http", type=_number(0, 65535), default=8080, metavar="PORT")
    parser.add_argument("--grpc", type=_number(0, 65535), default=8081, metavar="PORT")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS")
    parser.add_argument("--max-batch", type=_number(1), default=64, metavar="ROWS")
    parser.add_argument("--queue", type=_number(1), default=1024, metavar="REQUESTS")
    parser.add_argument("--threads", type=_threads, default="auto", metavar="N")
    parser.add_argument("--max-body", type=_number(1), default=16_000_000, metavar="BYTES")
    parser.add_argument("--workers", type=_number(1), default=1, metavar="N")
    parser.add_argument("--tls", nargs=2, type=Path, metavar=("CERT", "KEY"))
    parser.add_argument("--ca", type=Path, metavar="CA")
    options = vars(parser.parse_args(arguments))
    models, workers, tls, authority = (options.pop(name) for name in ("models", "workers", "tls", "ca"))
    if not models.is_dir():
        raise ValueError(
            f"{models}: there is no such folder\n  valid: a run, or a folder MODELS/NAME/VERSION, by export"
        )
    certificates = _certificates(tls, authority)
    worker = own_number()
    with exported_models(models) as folder:
        if workers > 1 and worker is None:
            threads = options["threads"] or max(1, len(os.sched_getaffinity(0)) // workers)
            each = [str(folder) if Path(argument) == models else argument for argument in arguments]
            each += ["--threads", str(threads)]
            return serve_by_workers(each, workers, options["host"], options["http"], options["grpc"])
        try:
            from trainer.service.server import Server, ServerOptions
        except ImportError as error:
            raise ValueError(f"serve needs the package {error.name}\n  pip install silotrain[serve]") from error
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        logging.getLogger("trainer.service").setLevel(logging.INFO)
        wanted = ServerOptions(**options, certificates=certificates, worker=worker, release=__version__)
        server = Server(folder, wanted)
        _allow_connections()
        with handle_stop_signals(on_stop=server.stop, on_kill=hard_exit):
            asyncio.run(_serve(server, is_first=not worker))
    return FINISHED


def _allow_connections() -> None:
    """Allow more open files, of which a connection is one: a process often may have 1,024 until it asks for more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_unlimited = most == resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES if is_unlimited else min(most, MAX_FILES), most))


async def _serve(server: Server, is_first: bool) -> None:
    await server.start()
    if is_first:
        print(_introduction(server), flush=True)
    await server.wait()


def _certificates(tls: Sequence[Path] | None, authority: Path | None) -> ServerCertificates | None:
    if tls:
        certificate, key = tls
        return ServerCertificates(certificate, key, authority)
    if authority:
        raise ValueError("--ca without --tls: clients show certificates over TLS alone\n  add --tls CERT KEY")
    return None


def _introduction(server: Server) -> str:
    """Return the text at the start: what is served where, and a command to try it."""
    versions = [next(iter(versions.values())) for versions in server.service.repository.models.values()]
    first = versions[0]
    served = ", ".join(f"{version.model} version {version.number}" for version in versions)
    return (
        f"serves {served}\n"
        f"  REST {server.http_url}, gRPC {server.grpc_address}, metrics {server.http_url}/metrics\n"
        f"  curl -d @{first.folder}/example.json {server.http_url}/v2/models/{first.model}/infer"
    )


def _number(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= most):
            valid = f"{least} to {most}" if most < sys.maxsize else f"{least} or more"
            raise ArgumentTypeError(f"got {text}, valid: a whole number, {valid}")
        return int(text)

    return number


def _threads(text: str) -> int | None:
    return None if text == "auto" else _number(1)(text)
