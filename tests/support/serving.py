"""A server of exported models in a thread of the test."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from trainer.service.server import Server, ServerOptions


@contextmanager
def serving(root: Path, **options: Any) -> Iterator[Server]:
    """Serve a folder at free ports, until the block is left."""
    server, started = Server(root, ServerOptions(**{"http": 0, "grpc": 0, "threads": 1, **options})), Event()
    errors: list[ValueError] = []

    async def run() -> None:
        try:
            await server.start()
        except ValueError as error:
            errors.append(error)
            return
        finally:
            started.set()
        await server.wait()

    thread = Thread(target=asyncio.run, args=[run()])
    thread.start()
    try:
        assert started.wait(30)
        if errors:
            raise errors[0]
        yield server
    finally:
        server.stop()
        thread.join(60)
    assert not thread.is_alive()
