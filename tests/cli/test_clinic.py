"""experiment=clinic: three launches with a table each are one silo with all tables, though one of them dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.reproduce.clinic import CLINICS, write
from tests.cli.command import DEADLINE_SECONDS, Shell, Started, work
from trainer.commands.main import main

CPU = ["launch.device=cpu", "launch.threads_per_worker=1"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(started: Started) -> None:
    """End a launch as a power cut does."""
    os.killpg(started.process.pid, signal.SIGKILL)
    started.process.wait()
    wait_until(lambda: not started.shell.running())


@pytest.mark.long
def test_three_clinics_are_one_silo_though_one_dies(
    new_shell: Callable[[], Shell], ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "clinics")
    monkeypatch.chdir(tmp_path)
    assert main(["certify", "certs", "coordinator", *CLINICS]) == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = {name: tmp_path / "clinics" / "sites" / f"{name}.csv" for name in CLINICS}
    common = ["experiment=clinic", f"site.certificates={tmp_path / 'certs'}", "run_dir=run", *CPU]
    members = f"site.members=[{','.join(CLINICS)}]"
    listens = [f"site.listen={address}", members, "site.grace_seconds=null"]

    def start(name: str, shell: Shell) -> Started:
        own = [f"site.name={name}", f"site.server={address}", f"data.path={files[name]}", "launch.nproc_per_node=1"]
        return shell.start("-m", "trainer", *common, *own)

    shells = {name: new_shell() for name in (*CLINICS, "coordinator")}
    sites = {name: start(name, shells[name]) for name in CLINICS}
    coordinator = shells["coordinator"].start("-m", "trainer", "coordinator", *common, *listens)
    metrics = shells["coordinator"].folder / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    kill(sites["rome"])
    sites["rome"] = start("rome", shells["rome"])
    for started in (coordinator, *sites.values()):
        ended = started.end()
        assert ended.code == 0, ended.err

    listed = f"data.files=[{','.join(map(str, files.values()))}]"
    ranks(1).run(work, ["experiment=clinic", listed, f"run_dir={tmp_path / 'one'}"])
    for name in ("model.safetensors", "best.safetensors", "columns.json"):
        found = {(shell.folder / "run" / name).read_bytes() for shell in shells.values()}
        assert found == {(tmp_path / "one" / name).read_bytes()}, name
    results = [json.loads((shell.folder / "run" / "result.json").read_text()) for shell in shells.values()]
    expected = json.loads((tmp_path / "one" / "result.json").read_text())
    for result in results:
        assert [result[name] for name in ("test/auc", "clients/worst_auc", "best_round")] == [
            expected[name] for name in ("test/auc", "clients/worst_auc", "best_round")
        ]
    assert expected["test/auc"] > 0.75
