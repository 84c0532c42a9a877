"""The jobs of a sweep, with a stand-in for the trainer: their table, their logs, and the exit code."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.commands.sweep.main import main
from trainer.distributed.launch import subprocesses

# One rank cannot be two silos; a job finds that when it starts.
TRAINER = """
import json, pathlib, sys
keys = dict(argument.split("=", 1) for argument in sys.argv[1:])
if keys["silos"] == "2":
    sys.exit("silos=2 does not divide the world of 1 ranks.")
folder = pathlib.Path(keys["run_dir"].strip('"'))
folder.mkdir(parents=True)
(folder / "result.json").write_text(json.dumps({"round": 1, "validation/accuracy": int(keys["seed"]) / 10}))
(folder / "state.json").write_text(json.dumps({"status": "finished"}))
"""
GRID = ("rounds=1", "seed=1,2", "silos=1,2", "hydra.launcher.jobs=2", "launch.device=cpu", "run_dir=grid")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to an empty folder, where a small program trains. A sweep disables the loggers of its process."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(subprocesses, "TRAINER", (str(tmp_path / "trainer.py"),))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    logging.disable(logging.NOTSET)


def table_of(out: str) -> list[list[str]]:
    """Return the first two words of the rows, best first."""
    return [row.split()[:2] for row in out.split("best first\n")[1].split("\n\n")[0].splitlines()]


def test_failed_jobs_do_not_end_the_sweep(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their logs are named and their errors printed; the others finish."""
    assert main(GRID) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    for seed in (1, 2):
        name = f"seed={seed},silos=2"
        assert f"{name}  failed  see grid/logs/{name}.log\n  silos=2 does not divide the world" in printed.out
    failed = [["failed", f"seed={seed},silos=2"] for seed in (1, 2)]
    assert table_of(printed.out) == [["0.2000", "seed=2,silos=1"], ["0.1000", "seed=1,silos=1"], *failed]
    log = (folder / "grid/logs/seed=2,silos=1.log").read_text()
    assert log.startswith("$ python -m trainer rounds=1 seed=2 silos=1 launch.device=cpu ")
    assert not list(folder.rglob(".hydra")) and not (folder / "multirun").exists()
