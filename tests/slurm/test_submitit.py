"""Sweeps through submitit: each job is one of SLURM, requeued at its time limit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.command import work
from tests.slurm.conftest import HERE, WORK, Project

SLURM = ("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=5")
SECONDS_TO_RUN = 120


def sweep(project: Project, *arguments: str) -> subprocess.Popen[str]:
    """Start a sweep on this machine, which is not a node."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "-m", *HERE, *SLURM, *arguments],
        cwd=project.folder,
        env=project.cluster.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_of(project: Project, name: str) -> str:
    """Return the id of the first running job of the sweep of this name."""
    options = ("--noheader", f"--name={name}", "--states=R", "-o", "%i")
    deadline = time.monotonic() + SECONDS_TO_RUN
    while True:
        for id in project.cluster.ask("squeue", *options).split():
            if id.endswith("_0"):
                return id
        assert time.monotonic() < deadline, project.cluster.log()
        time.sleep(0.1)


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + SECONDS_TO_RUN
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else log
        time.sleep(0.1)


@pytest.mark.long
def test_a_job_whose_time_is_up_goes_on(ranks, project: Project) -> None:
    """It saves at the signal before the limit, submitit requeues it, and it ends like an undisturbed one."""
    overrides = (*WORK, "launch.nproc_per_node=1")
    started = sweep(project, *overrides, "+model.seconds=0.05", "seed=1,2", "run_dir=study")
    id = first_of(project, "study")
    log = project.folder / "study/logs/seed=1.log"
    wait_for(log, "round 1/3")
    project.cluster.ask("scancel", "--signal=USR2", id)
    project.cluster.start_again(id)
    out, err = started.communicate(timeout=SECONDS_TO_RUN)
    assert started.returncode == 0 and "2 of 2 jobs, best first" in out, f"{out}{err}"
    assert log.read_text().count("continues from") == log.read_text().count("preempted; continue") == 1
    ranks(1).run(work, [*overrides, "seed=1", "run_dir=alone"], str(project.folder))
    assert project.weights(project.folder / "study/seed=1") == project.weights(project.folder / "alone")


@pytest.mark.long
def test_a_failed_job_does_not_end_the_sweep(project: Project) -> None:
    """One rank cannot be two silos. The log is in the same place as that of a local sweep."""
    started = sweep(project, *WORK, "launch.nproc_per_node=1", "silos=1,2", "run_dir=mixed")
    out, err = started.communicate(timeout=SECONDS_TO_RUN)
    assert started.returncode == 1 and "Traceback" not in err, f"{out}{err}"
    assert "failed  silos=2  see mixed/logs/silos=2.log" in out
    assert "silos=2 does not divide" in (project.folder / "mixed/logs/silos=2.log").read_text()
    assert json.loads((project.folder / "mixed/silos=1/state.json").read_text())["status"] == "finished"


def test_what_sbatch_would_refuse_is_said_at_once(project: Project) -> None:
    wrong = ("hydra.launcher.partition=norml", f"hydra.launcher.name={'x' * 1025}", "seed=1,2", "run_dir=refused")
    started = sweep(project, *wrong)
    out, err = started.communicate(timeout=SECONDS_TO_RUN)
    assert (started.returncode, out) == (2, "")
    assert "hydra.launcher.partition=norml" in err and "did you mean normal?\n  valid: normal, urgent" in err
    assert "hydra.launcher.name has 1025 characters\n  valid: 1024 at most" in err
    assert not (project.folder / "refused").exists()
