"""`python -m trainer -m`: real runs with their workers, in one folder from which a later start continues."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.cli.command import Ended, Shell, Started
from trainer.loggers import read_jsonl

pytestmark = pytest.mark.long

SMALL = ("launch.nproc_per_node=1", "launch.threads_per_worker=1", "launch.device=cpu", "model=mlp", "model.inputs=64")
# One rank cannot be two silos; a job finds that when it starts.
GRID = (*SMALL, "rounds=1", "seed=1,2", "silos=1,2", "hydra.launcher.jobs=2", "run_dir=grid")
SHUTDOWN_TIMEOUT_SECONDS = 15


def start(shell: Shell, *arguments: str) -> Started:
    return shell.start("-m", "trainer", "-m", *arguments)


@pytest.fixture(scope="module")
def grid(shell: Shell) -> Ended:
    """Run four jobs, two at a time, of which two fail."""
    return start(shell, *GRID).end()


def rows(ended: Ended) -> list[str]:
    """Return the lines of the table, best first."""
    return ended.out.split("best first\n")[1].split("\n\n")[0].splitlines()


def test_one_failed_job_does_not_end_the_sweep(shell: Shell, grid: Ended) -> None:
    """Its log is named and its error printed; the other jobs finish."""
    assert grid.code == 1 and grid.err == ""
    for seed in (1, 2):
        log = f"grid/logs/seed={seed},silos=2.log"
        assert f"seed={seed},silos=2  failed  see {log}\n  silos=2 does not divide the world of 1 ranks." in grid.out
        assert "silos=2 does not divide" in (shell.folder / log).read_text()
        assert (shell.folder / f"grid/seed={seed},silos=1/result.json").exists()
    assert "running: seed=1,silos=1; seed=1,silos=2" in grid.out
    assert grid.out.endswith("more:  python -m trainer report grid\n")


def test_the_table_is_best_first(shell: Shell, grid: Ended) -> None:
    best, worst, *failed = rows(grid)
    runs = {seed: shell.folder / f"grid/seed={seed},silos=1" for seed in (1, 2)}
    scores = {seed: result(run, "validation/accuracy") for seed, run in runs.items()}
    assert best.split() == [
        f"{max(scores.values()):#.4g}",
        f"seed={max(scores, key=lambda seed: scores[seed])},silos=1",
    ]
    assert float(best.split()[0]) >= float(worst.split()[0])
    assert [row.split()[:2] for row in failed] == [["failed", f"seed={seed},silos=2"] for seed in (1, 2)]


def result(run: Path, name: str) -> float:
    return json.loads((run / "result.json").read_text())[name]


def test_a_job_is_a_run_like_any_other(shell: Shell, grid: Ended) -> None:
    """It has its own results, its log contains the command, and Hydra leaves no file in its folder."""
    run = shell.folder / "grid/seed=2,silos=1"
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 2
    assert (
        (shell.folder / "grid/logs/seed=2,silos=1.log")
        .read_text()
        .startswith("$ python -m trainer launch.nproc_per_node=1 ")
    )
    runs = {f"seed={seed},silos=1" for seed in (1, 2)}
    assert {path.name for path in (shell.folder / "grid").iterdir()} == runs | {"logs"}
    assert not list(shell.folder.rglob(".hydra")) and not (shell.folder / "multirun").exists()


def test_what_has_finished_is_not_run_again(shell: Shell, grid: Ended) -> None:
    """The first of two parts holds the finished jobs; no worker is started."""
    before = (shell.folder / "grid/seed=1,silos=1/state.json").stat().st_mtime_ns
    ended = start(shell, *GRID, "hydra.launcher.part=[0,2]").end()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("already finished") == 2 and "silos=2" not in ended.out
    assert (shell.folder / "grid/seed=1,silos=1/state.json").stat().st_mtime_ns == before


def test_an_interrupted_sweep_is_continued(shell: Shell) -> None:
    """After a stop signal or SIGKILL its jobs save and stop too, and the same command continues."""
    sweep = (*SMALL, "rounds=20", "seed=1,2", "run_dir=long")
    log = shell.folder / "long/logs/seed=1.log"
    reported = start(shell, *sweep)
    wait_for(log, "clients   1", reported)
    reported.process.send_signal(signal.SIGTERM)
    ended = reported.end(within_seconds=SHUTDOWN_TIMEOUT_SECONDS)
    assert ended.code == 75 and "seed=1  saved and stopped" in ended.out
    assert ended.err.endswith("seed=1,2 run_dir=long\n") and "continue with\n  python -m trainer -m launch" in ended.err
    assert not (shell.folder / "long/seed=2").exists()
    killed = start(shell, *sweep)
    wait_for(log, "continues from", killed)
    killed.process.kill()
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT_SECONDS
    while shell.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.end()
    assert json.loads((shell.folder / "long/seed=1/state.json").read_text())["status"] in ("preempted", "finished")
    assert start(shell, *sweep).end().code == 0
    for seed in (1, 2):
        lines = read_jsonl(shell.folder / f"long/seed={seed}/metrics.jsonl")
        assert [line["round"] for line in lines] == list(range(1, 21))


def wait_for(log: Path, text: str, started: Started) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or text not in log.read_text():
        assert started.process.poll() is None and time.monotonic() < deadline, started.err.read_text()
        time.sleep(0.05)


def test_optuna_looks_for_the_best(shell: Shell) -> None:
    """Three trials in a range; failed ones do not end the study."""
    values = ("optimizer.lr=interval(0.05,0.3)", "silos=1,2", "objective=test/accuracy")
    study = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "run_dir=study")
    ended = start(shell, *SMALL, "rounds=1", *values, *study).end()
    assert ended.code == 1 and ended.err == "", ended.err
    table = [row.split() for row in rows(ended)]
    assert len(table) == 3 and table[0][0] != "failed" == table[-1][0]
    rates = [float(row[1].removeprefix("optimizer.lr=").split(",")[0]) for row in table]
    assert len(set(rates)) == 3 and all(0.05 <= rate <= 0.3 for rate in rates)
    written = yaml.safe_load((shell.folder / "study/logs/optimization_results.yaml").read_text())
    assert written["best_params"]["optimizer.lr"] == rates[0]
    assert written["best_value"] == result(shell.folder / "study" / table[0][1], "test/accuracy")
