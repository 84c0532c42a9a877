"""`serve --workers`: one process dies, and nobody notices."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cli.command import ROOT
from tests.support.browser import until
from tests.support.exported import write_linear
from trainer.service.version import EXAMPLE_REQUEST

WORKERS = 2


class Served:
    """The command, and how often it was asked."""

    def __init__(self, process: subprocess.Popen[str], address: str, request: bytes):
        self.process, self.requests = process, 0
        self._address, self._request = address, request

    def ask(self, times: int) -> None:
        """Send requests, each over a connection of its own."""
        for _ in range(times):
            answer = httpx.post(f"{self._address}/v2/models/linear/infer", content=self._request)
            assert answer.status_code == 200
            self.requests += 1

    def counted(self) -> float:
        """Return the requests that the workers have counted together."""
        families = text_string_to_metric_families(httpx.get(f"{self._address}/metrics").text)
        (success,) = (family for family in families if family.name == "nv_inference_request_success")
        return sum(sample.value for sample in success.samples)

    def workers(self) -> set[int]:
        return {child.pid for child in psutil.Process(self.process.pid).children()}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    version = write_linear(tmp_path / "models" / "linear", 1)
    command = [
        sys.executable,
        "-m",
        "trainer",
        "serve",
        "models",
        "--workers",
        str(WORKERS),
        "--http",
        "0",
        "--grpc",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            address = next(found[1] for line in process.stdout if (found := re.search(r"REST (http://\S+),", line)))
            yield Served(process, address, (version / EXAMPLE_REQUEST).read_bytes())
        finally:
            process.terminate()
            process.communicate(timeout=60)


def test_a_worker_is_killed_and_the_other_one_answers_until_it_is_back(served: Served) -> None:
    served.ask(20)
    first = served.workers()
    assert len(first) == WORKERS
    until(lambda: served.counted() == served.requests)
    os.kill(min(first), signal.SIGKILL)
    until(lambda: len(served.workers()) == WORKERS - 1 or served.workers() != first)
    served.ask(20)
    until(lambda: len(served.workers()) == WORKERS)
    served.ask(20)
    assert served.counted() == served.requests == 60
    served.process.terminate()
    served.process.wait(60)
    assert served.process.returncode == 0
    assert not any(psutil.pid_exists(each) for each in first)
