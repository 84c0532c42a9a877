"""Ranks that stay alive for a whole test session: a call takes milliseconds, and a start takes seconds."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

DEADLINE_SECONDS = 120
SECONDS_FOR_OTHER_ERRORS = 1
PRELOADED = ["hypothesis", "torch._dynamo", "trainer.commands.train.worker"]  # which ranks import sooner or later


@cache
def server_of(rank: int) -> ForkServer:
    """Return the process from which this rank of every world is forked, so that it imports torch only once.

    Each rank has one of its own, and with it another seed of the hashes, as processes have that are started one by one.
    """
    server = ForkServer()
    server.set_forkserver_preload(PRELOADED)
    return server


class RankPool:
    """A world of gloo ranks that runs any importable function; a rank's traceback becomes the assertion's text."""

    def __init__(self, size: int):
        self.size = size
        self.workers: list[tuple[Any, Connection]] = []
        self.folder: tempfile.TemporaryDirectory[str] | None = None  # with the store of the workers

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on each rank, and return the results in rank order."""
        if not self.workers:
            self._start()
        for _, connection in self.workers:
            connection.send_bytes(pickle.dumps((function, arguments)))
        answers = self._collect()
        errors = {rank: text for rank, (fine, text) in answers.items() if not fine}
        missing = sorted(set(range(self.size)) - set(answers))
        if errors or missing:
            self.stop()
            listed = "\n".join(f"rank {rank}:\n{text}" for rank, text in errors.items())
            raise AssertionError(f"{listed}\nno answer from ranks {missing}" if missing else listed)
        return [answers[rank][1] for rank in range(self.size)]

    def stop(self) -> None:
        """End the ranks; the next call starts new ones."""
        for process, connection in self.workers:
            connection.close()
            process.terminate()  # unlike SIGKILL, this leaves time to save the coverage
            process.join(1)
            process.kill()
            process.join()
        self.workers = []
        if self.folder:
            self.folder.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        servers = [server_of(rank) for rank in range(self.size)]
        for server in servers:
            server.ensure_running()  # they import at the same time
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = Path(self.folder.name) / "store"
        for rank, server in enumerate(servers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, str(store)), daemon=True)
            with patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
                process.start()
            theirs.close()
            self.workers.append((process, ours))

    def _collect(self) -> dict[int, tuple[bool, Any]]:
        """Return the answers by rank. After the first error the others have a second to report theirs."""
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self.workers)}
        deadline = time.monotonic() + DEADLINE_SECONDS
        while waiting and (ready := wait(list(waiting), max(deadline - time.monotonic(), 0))):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                answers[rank] = _receive(self.workers[rank][0], connection)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + SECONDS_FOR_OTHER_ERRORS)
        return answers


def _receive(process: Any, connection: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        process.join(1)
        return False, f"the process ended with code {process.exitcode}"


def _serve(connection: Connection, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    # Deprecations of torch fail in the trainer's modules, and not in references written by hand.
    warnings.filterwarnings("error", category=FutureWarning, module=r"trainer\.")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
