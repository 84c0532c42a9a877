"""A SLURM cluster for the session, and a folder from which jobs are submitted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.command import work
from tests.support.cluster import Cluster, Job, new_cluster, why_not

ROOT = Path(__file__).parents[2]
MODELS = """
import time
from torch import nn

class Small(nn.Module):
    def __init__(self, seconds=0.0):
        super().__init__()
        self.layer, self.drop, self.seconds = nn.Linear(64, 10), nn.Dropout(0.2), seconds

    def forward(self, images):
        time.sleep(self.seconds * self.training)
        return self.layer(self.drop(images.flatten(1)))
"""
WORK = ("model=custom", "model._target_=own.Small", "round.steps=40", "rounds=3", "optimizer=adamw")
HERE = ("launch.device=cpu", "launch.threads_per_worker=1")
SMALL = ("--cpus-per-task=1",)


@dataclass(frozen=True)
class Project:
    """A folder with slurm/, an environment to activate, and a user's model."""

    folder: Path
    cluster: Cluster

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), launch: str = "torchrun") -> str:
        """Submit one of our scripts with these overrides, and return the id of the job."""
        variables = f"--export=ALL,LAUNCH={launch}"
        return self.cluster.submit(*SMALL, *options, variables, f"slurm/{script}", *arguments, folder=self.folder)

    def srun(self, options: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
        """Start Python with these arguments in tasks, as a user would by hand."""
        return self.cluster.run("srun", "--quiet", *options, sys.executable, *arguments, folder=self.folder)

    def weights(self, run: Path) -> bytes:
        """Return the bytes of the finished model of a run."""
        return (run / "model.safetensors").read_bytes()

    def out(self, id: str) -> str:
        """Return the output of a job."""
        return "".join(path.read_text() for path in self.folder.glob(f"*-{id}.out"))

    def wait_for(self, id: str, text: str, within_seconds: float = 90) -> None:
        """Wait until a job has printed this; raise AssertionError if it has ended or takes too long."""
        self.cluster.wait_for(id, lambda job: text in self.out(id) or job.has_ended, within_seconds)
        assert text in self.out(id), self.out(id)

    def end_of(self, id: str, within_seconds: float = 90) -> Job:
        """Wait for the end of a job, which must succeed."""
        job = self.cluster.wait_for(id, lambda job: job.has_ended, within_seconds)
        assert (job.state, job.code) == ("COMPLETED", 0), f"{job}\n{self.out(id)}"
        return job


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with two (pretended) GPUs, and three with one."""
    if reason := why_not():
        pytest.skip(reason)
    with new_cluster(gpus=(2, 2, 1, 1, 1)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def new_project(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Project]:
    """Make a project in an empty folder."""
    cluster.environment |= {
        "PYTHONPATH": str(ROOT),
        "SILOTRAIN_CACHE": str(tmp_path_factory.getbasetemp() / "cache"),
        "XDG_CONFIG_HOME": str(tmp_path_factory.getbasetemp() / "config"),
        "OMP_NUM_THREADS": "1",
    }

    def make() -> Project:
        folder = tmp_path_factory.mktemp("project")
        (folder / "slurm").symlink_to(ROOT / "slurm")
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/bin/activate").write_text(f"PATH={Path(sys.executable).parent}{os.pathsep}$PATH\n")
        (folder / "own.py").write_text(MODELS)
        return Project(folder, cluster)

    return make


@pytest.fixture(scope="session")
def limited(new_project: Callable[[], Project]) -> tuple[Project, str]:
    """A job with 45 seconds of work, which SLURM warns when the cluster is half a minute old.

    SLURM checks time limits every 30 seconds, and warns a job if the time of its warning is before the next check.
    """
    project = new_project()
    overrides = (*HERE, *WORK, "+model.seconds=0.375", "launch.nproc_per_node=2", "run_dir=limited")
    limits = ("--time=1", "--signal=B:USR1@20", "--nodes=1", "--nodelist=node1")
    return project, project.submit("train.sbatch", *overrides, options=limits)


@pytest.fixture(scope="session", autouse=True)
def begin_early(request: pytest.FixtureRequest) -> None:
    """Submit the job that waits for SLURM's clock before the first test, if one of them needs it."""
    if any("limited" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("limited")


@pytest.fixture(scope="session")
def alone(ranks, new_project: Callable[[], Project]) -> bytes:
    """Return the weights of an undisturbed run of two workers without SLURM."""
    project = new_project()
    ranks(2).run(work, [*WORK, "run_dir=alone"], str(project.folder))
    return project.weights(project.folder / "alone")


@pytest.fixture(scope="module")
def project(new_project: Callable[[], Project]) -> Project:
    """Return a project for all tests of a file."""
    return new_project()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder as needing SLURM."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")
