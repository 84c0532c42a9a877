"""Jobs that are preempted, run out of time or lose a node are requeued, and end like undisturbed ones."""

from __future__ import annotations

import json

import pytest

from tests.slurm.conftest import HERE, WORK, Project

pytestmark = pytest.mark.long

SLOWLY = "+model.seconds=0.08"  # 10 seconds of work


@pytest.fixture(scope="module")
def jobs(project: Project) -> dict[str, str]:
    """Two jobs on two nodes, with a rank on each: after a round one is warned, and the other loses its first node."""

    def submit(launch: str, name: str, nodes: str) -> str:
        overrides = (*HERE, *WORK, SLOWLY, f"run_dir={name}", "launch.nproc_per_node=1")
        return project.submit("train.sbatch", *overrides, options=("--nodes=2", nodes), launch=launch)

    submitted = {
        "warned": submit("srun", "warned", "--nodelist=node[1-2]"),
        "bereft": submit("torchrun", "bereft", "--exclude=node[1-2]"),
    }
    project.wait_for(submitted["warned"], "round 1/3")
    project.cluster.ask("scancel", "--signal=USR1", "--batch", submitted["warned"])
    project.wait_for(submitted["bereft"], "round 1/3")
    project.cluster.kill(project.cluster.job(submitted["bereft"]).facts["BatchHost"])
    return submitted


def test_a_job_that_is_warned_saves_and_is_queued_again(jobs: dict[str, str], project: Project, alone: bytes) -> None:
    """SIGUSR1 goes to the batch script, as before the time limit; the workers are SLURM's tasks."""
    job, run = jobs["warned"], project.folder / "warned"
    project.cluster.wait_for(job, lambda job: job.state == "PENDING")
    assert json.loads((run / "state.json").read_text())["status"] == "preempted"
    project.cluster.start_again(job)
    assert project.end_of(job).restarts == 1
    assert "continues from round" in project.out(job)
    assert project.weights(run) == alone


def test_a_job_whose_node_dies_goes_on_with_another(jobs: dict[str, str], project: Project, alone: bytes) -> None:
    """It is the node of rank 0 and of the batch script."""
    job = jobs["bereft"]
    (lost,) = (node.name for node in project.cluster.nodes if node.process is None)
    again = project.cluster.start_again(job)
    assert lost not in again.facts["NodeList"]
    assert project.end_of(job).restarts == 1
    assert "continues from round" in project.out(job)
    assert project.weights(project.folder / "bereft") == alone


def test_a_job_whose_time_is_shorter_than_its_work_comes_to_its_end(limited: tuple[Project, str], alone: bytes) -> None:
    """SLURM warns before the limit; the second start does the rest of the work."""
    project, job = limited
    project.cluster.start_again(job)
    project.cluster.ask("scontrol", "update", f"jobid={job}", "timelimit=5")
    assert project.end_of(job).restarts >= 1
    assert "continues from round" in project.out(job)
    assert project.weights(project.folder / "limited") == alone
