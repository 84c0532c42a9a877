"""A SLURM cluster for the session, and a folder to submit jobs from as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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
SMALL = ("--cpus-per-task=1", "--gres=none")


@dataclass(frozen=True)
class Project:
    """A folder with slurm/, an environment to activate, and a model of one's own."""

    folder: Path
    cluster: Cluster

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), launch: str = "torchrun") -> str:
        """The id of the job that a script of ours makes with these overrides."""
        variables = f"--export=ALL,LAUNCH={launch}"
        return self.cluster.submit(*SMALL, *options, variables, f"slurm/{script}", *arguments, folder=self.folder)

    def srun(self, options: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
        """Python with these arguments in tasks that a user starts by hand."""
        return self.cluster.run("srun", "--quiet", *options, sys.executable, *arguments, folder=self.folder)

    def train(self, *overrides: str) -> Path:
        """The folder of a run on this machine, without SLURM, that nobody disturbs."""
        run = self.folder / uuid.uuid4().hex
        command = [sys.executable, "-m", "trainer", *HERE, *overrides, f"run_dir={run}"]
        ended = self.cluster.run(*command, folder=self.folder)
        assert ended.returncode == 0, ended.stderr
        return run

    def weights(self, run: Path) -> bytes:
        """The finished model of a run, as it lies on disk."""
        return (run / "model.safetensors").read_bytes()

    def out(self, id: str) -> str:
        """What a job has written."""
        return "".join(path.read_text() for path in self.folder.glob(f"*-{id}.out"))

    def wait_for(self, id: str, text: str, within_seconds: float = 90) -> None:
        """Returns when a job has written this; AssertionError if it has ended, or been slow."""
        self.cluster.wait_for(id, lambda job: text in self.out(id) or job.has_ended, within_seconds)
        assert text in self.out(id), self.out(id)

    def end_of(self, id: str, within_seconds: float = 90) -> Job:
        """A job that has ended well."""
        job = self.cluster.wait_for(id, lambda job: job.has_ended, within_seconds)
        assert (job.state, job.code) == ("COMPLETED", 0), f"{job}\n{self.out(id)}"
        return job


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with two (pretended) GPUs and three with one."""
    if reason := why_not():
        pytest.skip(reason)
    with new_cluster(gpus=(2, 2, 1, 1, 1)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def new_project(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Project]:
    """A project in an empty folder."""
    cluster.environment |= {
        "PYTHONPATH": str(ROOT),
        "SILOTRAIN_CACHE": str(tmp_path_factory.getbasetemp() / "cache"),
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


@pytest.fixture(scope="session", autouse=True)
def limited(new_project: Callable[[], Project]) -> tuple[Project, str]:
    """A job of 45 seconds of work or more, which SLURM warns when the cluster is half a minute old.

    SLURM looks at the limits of time every 30 seconds, and warns those early that it would warn before the next time.
    """
    project = new_project()
    overrides = (*HERE, *WORK, "+model.seconds=0.375", "launch.nproc_per_node=2", "run_dir=limited")
    limits = ("--time=1", "--signal=B:USR1@20", "--nodes=1", "--nodelist=node1")
    return project, project.submit("train.sbatch", *overrides, options=limits)


@pytest.fixture(scope="session")
def alone(limited: tuple[Project, str]) -> bytes:
    """The weights that two workers come to without SLURM, disturbed by nobody."""
    project, _ = limited
    return project.weights(project.train(*WORK, "launch.nproc_per_node=2"))


@pytest.fixture(scope="module")
def project(new_project: Callable[[], Project]) -> Project:
    """The project of a file of tests."""
    return new_project()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever lies here needs SLURM."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")
