"""Load our server for minutes, and print its memory as it goes.

    python -m scripts.bench.serve.load [--seconds 600]

The models are those of the benchmark. gRPC and JSON are asked at once, each with 64 requests in flight, which takes the
whole processor. A thousand silent connections are open meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from scripts.bench.serve.client import Ask, over_grpc, over_http
from scripts.bench.serve.models import SMALL, Exported, write_models
from scripts.bench.serve.servers import OURS, Server, start

IN_FLIGHT = 64
SILENT = 1000
SAMPLES = 20


async def _load(server: Server, model: Exported, seconds: float) -> list[tuple[float, int, float]]:
    """Return the seconds, the requests so far, and the megabytes of the server, at regular times."""
    answered = 0
    end = time.monotonic() + seconds

    async def repeat(ask: Ask) -> None:
        nonlocal answered
        while time.monotonic() < end:
            await ask()
            answered += 1

    async def silent() -> None:
        """Keep connections that send nothing; the server closes them, and they are opened again."""
        async with AsyncExitStack() as kept:
            while time.monotonic() < end:
                for _ in range(SILENT):
                    _, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
                    kept.callback(writer.close)
                await asyncio.sleep(min(60, max(end - time.monotonic(), 0)))
                await kept.aclose()

    async def sample() -> list[tuple[float, int, float]]:
        samples = []
        for index in range(SAMPLES + 1):
            await asyncio.sleep(max(0, end - seconds * (1 - index / SAMPLES) - time.monotonic()))
            samples.append((seconds * index / SAMPLES, answered, server.megabytes()))
        return samples

    async with AsyncExitStack() as stack:
        body, path = server.kind.body(model.request), server.kind.path(model.name)
        by_grpc = await over_grpc(server.grpc_port, model.message, stack)
        by_http = [await over_http(server.http_port, path, body, stack) for _ in range(IN_FLIGHT)]
        asks = [*[by_grpc] * IN_FLIGHT, *by_http]
        sampling = asyncio.create_task(sample())
        await asyncio.gather(silent(), *map(repeat, asks))
        return await sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    choices = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder) / "models")
        with start(OURS, sys.executable, Path(folder) / "models", Path(folder) / "log", "--threads", "1") as server:
            server.wait()
            for seconds, answered, megabytes in asyncio.run(_load(server, models[SMALL], choices.seconds)):
                print(f"after {seconds:4.0f} s: {answered:,} requests answered, {megabytes:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
