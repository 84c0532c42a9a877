"""Compare the server with others, all with the same exported models, and print Markdown tables.

    python -m scripts.bench.serve [--peers PYTHON ...] [--rounds 5]

The models are the CNN of digits (0.03 ms) and resnet20 for 3 x 32 x 32 images, both untrained; every session has one
thread. The peers are the kserve SDK 0.21.0, MLServer 1.7.1, LitServe, and FastAPI with pydantic by hand (`peers/`).
Each is run by the first of the interpreters that has its package, and left out if none has; MLServer needs an
environment of its own. All servers are started at once, and measured in turn, round by round, while the others are
stopped (SIGSTOP). The client sends the same bytes again and again, from another process than any server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from scripts.bench.serve.client import Ask, ask_many, over_grpc, over_http
from scripts.bench.serve.models import BIG, SMALL, Exported, write_models
from scripts.bench.serve.servers import OTHERS, OURS, Kind, Server, interpreter_of, start

IN_FLIGHT = 16
WARM_UP = 300
REQUESTS = 1500  # of the small model, 16 in flight
ONE_BY_ONE = 300
BIG_REQUESTS = 320
MAX_DIFFERENCE = 1e-4


@dataclass
class Figures:
    """The figures of a server, one of each round.

    Attributes:
        grpc_ms: processor time a request of the small model over gRPC, 16 in flight.
        json_ms: the same over HTTP with JSON.
        p50_ms: median time of a request over gRPC, one at a time.
        images_per_second: of the big model, 16 in flight, over gRPC or JSON.
        megabytes: memory after all that.
    """

    grpc_ms: list[float] = field(default_factory=list)
    json_ms: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    images_per_second: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)


async def _asks(server: Server, model: Exported, count: int, grpc: bool, stack: AsyncExitStack) -> list[Ask]:
    """Return `count` ways to ask at once: streams of one channel, or connections."""
    if grpc:
        return [await over_grpc(server.grpc_port, model.message, stack)] * count
    body = server.kind.body(model.request)
    return [await over_http(server.http_port, server.kind.path(model.name), body, stack) for _ in range(count)]


async def _processor_ms(server: Server, model: Exported, grpc: bool) -> float:
    async with AsyncExitStack() as stack:
        asks = await _asks(server, model, IN_FLIGHT, grpc, stack)
        await ask_many(asks, WARM_UP)
        before = server.processor_seconds()
        await ask_many(asks, REQUESTS)
        return 1000 * (server.processor_seconds() - before) / REQUESTS


async def _p50_ms(server: Server, model: Exported) -> float:
    async with AsyncExitStack() as stack:
        asks = await _asks(server, model, 1, True, stack)
        await ask_many(asks, WARM_UP // 3)
        return 1000 * median(await ask_many(asks, ONE_BY_ONE))


async def _images_per_second(server: Server, model: Exported) -> float:
    async with AsyncExitStack() as stack:
        asks = await _asks(server, model, IN_FLIGHT, server.kind.is_open_inference, stack)
        await ask_many(asks, 2 * IN_FLIGHT)
        begun = time.perf_counter()
        await ask_many(asks, BIG_REQUESTS)
        return BIG_REQUESTS / (time.perf_counter() - begun)


async def _check(server: Server, model: Exported) -> None:
    """Check that the scores of a server's answer are those of the bare session."""
    async with AsyncExitStack() as stack:
        (ask,) = await _asks(server, model, 1, False, stack)
        answer = json.loads(await ask())
    found = answer["outputs"]
    if server.kind.is_open_inference:
        found = next(output["data"] for output in found if output["name"] == "scores")
    difference = np.abs(np.ravel(found) - model.scores.ravel()).max()
    assert difference < MAX_DIFFERENCE, f"{server.kind.name}: {model.name} differs by {difference}"


async def _measure(server: Server, models: dict[str, Exported], figures: Figures) -> None:
    small, big = models[SMALL], models[BIG]
    if server.kind.is_open_inference:
        figures.grpc_ms.append(await _processor_ms(server, small, grpc=True))
        figures.p50_ms.append(await _p50_ms(server, small))
    figures.json_ms.append(await _processor_ms(server, small, grpc=False))
    figures.images_per_second.append(await _images_per_second(server, big))
    figures.megabytes.append(server.megabytes())


def _bare(models: dict[str, Exported]) -> tuple[float, float]:
    """Return the milliseconds of the small model alone, and images/s of the big one in a bare loop at batch 16."""
    seconds = []
    for _ in range(ONE_BY_ONE):
        begun = time.perf_counter()
        models[SMALL].run(1)
        seconds.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    for _ in range(BIG_REQUESTS // IN_FLIGHT):
        models[BIG].run(IN_FLIGHT)
    return 1000 * median(seconds), BIG_REQUESTS / (time.perf_counter() - begun)


def _cell(values: Sequence[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})" if values else "-"


def _ratio(ours: Sequence[float], others: Sequence[float]) -> str:
    return f"{median(a / b for a, b in zip(ours, others, strict=True)):.2f}" if ours and others else "-"


def _tables(figures: dict[Kind, Figures], bare: list[tuple[float, float]]) -> str:
    """Return the tables: each server, and ours over it, as medians over the rounds with the least and the greatest."""
    ours = figures[OURS]
    lines = [
        "| server | gRPC, ms of processor a request | ours over it | JSON, ms of processor | ours over it | "
        "gRPC p50, one client, ms | resnet20, images/s | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, own in figures.items():
        cells = [
            *(_cell(own.grpc_ms, 2), _ratio(ours.grpc_ms, own.grpc_ms)),
            *(_cell(own.json_ms, 2), _ratio(ours.json_ms, own.json_ms)),
            *(_cell(own.p50_ms, 2), _cell(own.images_per_second, 0), f"{own.megabytes[-1]:.0f}"),
        ]
        lines.append(f"| {kind.name} | {' | '.join(cells)} |")
    model_ms, bare_rate = zip(*bare, strict=True)
    added = median(mine - alone for mine, alone in zip(ours.p50_ms, model_ms, strict=True))
    lines += [
        "",
        "| | | goal |",
        "|---|---|---|",
        f"| p50 over gRPC above the model's own {median(model_ms):.2f} ms | {added:.2f} ms | 0.7 |",
        f"| resnet20, 16 in flight, over a bare loop at batch 16 ({_cell(bare_rate, 0)} images/s) | "
        f"{_ratio(ours.images_per_second, bare_rate)} | 0.9 |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", default=[], metavar="PYTHON", help="interpreters that have the others")
    parser.add_argument("--rounds", type=int, default=5)
    choices = parser.parse_args()
    figures: dict[Kind, Figures] = {}
    bare: list[tuple[float, float]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = write_models(folder / "models")
        servers: list[Server] = []
        for kind in (OURS, *OTHERS):
            if python := interpreter_of(kind, choices.peers):
                log = folder / f"{kind.name}.log"
                server = stack.enter_context(start(kind, python, folder / "models", log, "--threads", "1"))
                server.wait()
                for model in models.values():
                    asyncio.run(_check(server, model))
                server.send(signal.SIGSTOP)
                figures[kind] = Figures()
                servers.append(server)
        for _ in range(choices.rounds):
            bare.append(_bare(models))
            for server in servers:
                server.send(signal.SIGCONT)
                asyncio.run(_measure(server, models, figures[server.kind]))
                server.send(signal.SIGSTOP)
    print(_tables(figures, bare))


if __name__ == "__main__":
    main()
