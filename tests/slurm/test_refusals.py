"""Invalid requests are reported once, by one of all processes, before training."""

from __future__ import annotations

import pytest
import torch

from tests.slurm.conftest import HERE, Project

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
TWO_ON_A_NODE = ("--nodes=1", "--ntasks=2")
ONE_A_NODE = ("--nodes=2", "--ntasks=2")
REFUSED = {
    "number": (
        TWO_ON_A_NODE,
        (),
        ("launch.nproc_per_node=3",),
        "launch.nproc_per_node=3, but srun has started 2 ranks",
    ),
    "device": (ONE_A_NODE, (), ("launch.device=cuda",), "each rank needs a GPU, but 0 are visible"),
    "torchruns": (TWO_ON_A_NODE, TORCHRUN, (), "torchrun was started by srun with 2 tasks a node"),
    "strangers": (ONE_A_NODE, TORCHRUN, (), "torchrun knows of 1 node, but srun has started it on 2"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.long
@pytest.mark.parametrize(("tasks", "launcher", "overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_a_world_that_does_not_fit_is_refused(
    tasks: tuple[str, ...], launcher: tuple[str, ...], overrides: tuple[str, ...], message: str, project: Project
) -> None:
    """The exit code is 2; under torchrun it is 0, since torchrun would report each of its ranks."""
    ended = project.srun(tasks, *launcher, "-m", "trainer", *HERE, *overrides, "run_dir=refused")
    assert ended.stderr.count(message) == 1, ended.stderr
    assert ended.returncode == (0 if launcher else 2), ended.stderr
    assert "Traceback" not in ended.stderr and ended.stdout == ""
    assert not (project.folder / "refused").exists()


def test_bad_overrides_end_a_job_before_its_step(project: Project) -> None:
    job = project.submit("train.sbatch", *HERE, "rouds=3")
    ended = project.cluster.wait_for(job, lambda job: job.has_ended)
    assert (ended.state, ended.code) == ("FAILED", 2)
    assert project.out(job).count("rouds is no key; did you mean rounds?") == 1 and "srun" not in project.out(job)


def test_another_launch_than_there_is_is_said(project: Project) -> None:
    job = project.submit("train.sbatch", *HERE, launch="mpirun")
    assert project.cluster.wait_for(job, lambda job: job.has_ended).code == 2
    assert project.out(job) == "LAUNCH=mpirun\n  valid: torchrun, one launcher a node; srun, one task a GPU\n"
