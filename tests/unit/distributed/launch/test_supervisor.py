"""Processes side by side, of which one dies."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.browser import until
from trainer.distributed.launch.signals import SignalHandler
from trainer.distributed.launch.supervisor import supervise

# Writes its process id, and waits.
WAITS = "import os, pathlib, time; pathlib.Path(os.environ['NAME'], str(os.getpid())).touch(); time.sleep(1000)"
FATAL_CODE = 2


def start(pool: ThreadPoolExecutor, script: str, folders: list[Path], signals: SignalHandler) -> Future[int]:
    environments = [{"NAME": str(folder)} for folder in folders]
    return pool.submit(supervise, ["-S", "-c", script], environments, signals, 10.0, FATAL_CODE)


def process_ids(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir()}


def test_a_killed_process_is_started_again_and_the_other_one_is_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    signals = SignalHandler()
    with ThreadPoolExecutor(1) as pool:
        ended = start(pool, WAITS, folders, signals)
        try:
            until(lambda: all(map(process_ids, folders)))
            (first,), (other,) = map(process_ids, folders)
            os.kill(first, signal.SIGKILL)
            until(lambda: len(process_ids(folders[0])) == 2)
            assert process_ids(folders[1]) == {other} and not ended.done()
        finally:
            signals.handle(signal.SIGTERM)
        assert ended.result() == 0
    for folder in folders:
        assert not any(Path(f"/proc/{each}").exists() for each in process_ids(folder))
    assert capfd.readouterr().err == "worker 0 was killed by SIGKILL; it is started again in 0.5 s\n"


def test_bad_input_ends_them_all(tmp_path: Path) -> None:
    script = f"import os, sys; sys.exit(2) if os.environ['NAME'].endswith('1') else exec({WAITS!r})"
    with ThreadPoolExecutor(1) as pool:
        (tmp_path / "0").mkdir()
        assert start(pool, script, [tmp_path / "0", tmp_path / "1"], SignalHandler()).result(60) == FATAL_CODE
    assert not any(Path(f"/proc/{each}").exists() for each in process_ids(tmp_path / "0"))
