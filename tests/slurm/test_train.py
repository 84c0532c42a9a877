"""Undisturbed jobs: a task for each GPU, and silos of different sizes."""

from __future__ import annotations

import pytest

from tests.cli.command import work
from tests.slurm.conftest import HERE, WORK, Project

FEDERATED = (*WORK, "partition=dirichlet", "partition.alpha=0.5")


@pytest.fixture(scope="module")
def jobs(project: Project) -> dict[str, str]:
    """Run all jobs side by side."""
    gpus, sizes = ("--gres=gpu:2", "--cpus-per-task=2"), ("--ntasks=3", "--ntasks-per-node=2")
    return {
        "gpus": project.submit("train.sbatch", *HERE, *WORK, options=gpus, launch="srun"),
        "sizes": project.submit("federated.sbatch", *HERE, *FEDERATED, options=sizes, launch="srun"),
    }


@pytest.mark.long
def test_each_gpu_of_a_node_has_a_task(jobs: dict[str, str], project: Project, alone: bytes) -> None:
    """The weights are those of two workers without SLURM, bit for bit; the run folder has the number of the job."""
    job = jobs["gpus"]
    project.end_of(job)
    assert "replicas in the silos: [2]" in project.out(job)
    assert project.weights(project.folder / "outputs/digits-sync" / job) == alone


@pytest.mark.long
def test_a_node_with_two_tasks_and_one_with_one_are_silos_of_these_sizes(
    ranks, jobs: dict[str, str], project: Project
) -> None:
    ranks(3).run(work, [*FEDERATED, "algorithm=fedavg", "silos=[2,1]", "run_dir=alone"], str(project.folder))
    job = jobs["sizes"]
    project.end_of(job)
    assert "replicas in the silos: [2,1]" in project.out(job)
    assert project.weights(project.folder / "outputs/digits-fedavg" / job) == project.weights(project.folder / "alone")
