"""Jobs that are cancelled, displaced by a more urgent one, or spread over heterogeneous groups of nodes."""

from __future__ import annotations

import json

import pytest

from tests.slurm.conftest import HERE, SMALL, WORK, Project

pytestmark = pytest.mark.long
SLOWLY = (*HERE, *WORK, "+model.seconds=0.08")  # 10 seconds of work


@pytest.mark.parametrize("launch", ["torchrun", "srun"])
def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(project: Project, launch: str) -> None:
    run = f"run_dir=cancelled-{launch}"
    job = project.submit("train.sbatch", *SLOWLY, run, "launch.nproc_per_node=1", options=("--nodes=2",), launch=launch)
    project.wait_for(job, "round 1/3")
    project.cluster.ask("scancel", job)
    ended = project.cluster.wait_for(job, lambda job: job.has_ended)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    state = json.loads((project.folder / f"cancelled-{launch}/state.json").read_text())
    assert state["status"] == "preempted"


@pytest.mark.parametrize("launch", ["torchrun", "srun"])
def test_a_job_that_makes_room_for_another_goes_on_after_it(project: Project, alone: bytes, launch: str) -> None:
    """SLURM signals the steps and gives them a minute; the script does the rest."""
    overrides = (*SLOWLY, f"run_dir=displaced-{launch}", "launch.nproc_per_node=1")
    nodes = ("--nodes=2", "--nodelist=node[3-4]", "--exclusive")
    job = project.submit("train.sbatch", *overrides, options=nodes, launch=launch)
    project.wait_for(job, "round 1/3")
    project.cluster.submit(*nodes, "--gres=none", "--partition=urgent", "--wrap=sleep 1", folder=project.folder)
    project.cluster.start_again(job)
    assert project.end_of(job).restarts == 1
    assert "continues from round" in project.out(job)
    assert project.weights(project.folder / f"displaced-{launch}") == alone


@pytest.mark.parametrize("launch", ["torchrun", "srun"])
def test_the_groups_of_a_heterogeneous_job_are_one_world(project: Project, launch: str) -> None:
    """Two tasks, or one launcher of two workers, on one node; one task, or one launcher, on another."""
    first = (*SMALL, f"--ntasks-per-node={2 if launch == 'srun' else 1}", "--nodes=1")
    second = (*SMALL, "--ntasks-per-node=1", "--nodes=1")
    overrides = (*SLOWLY, f"run_dir=groups-{launch}", "launch.nproc_per_node=auto")
    script = (f"--export=ALL,LAUNCH={launch}", "slurm/federated.sbatch", *overrides)
    job = project.cluster.submit(*first, ":", *second, *script, folder=project.folder)
    project.wait_for(job, "round 1/3")
    project.cluster.ask("scancel", "--signal=USR1", "--batch", job)
    project.cluster.start_again(job)
    project.end_of(job)
    sizes = "[2,1]" if launch == "srun" else "[2,2]"
    assert f"replicas in the silos: {sizes}" in project.out(job)
    assert "continues from round" in project.out(job)
