"""The runs of a sweep, divided among the tasks of an array."""

from __future__ import annotations

import json

import pytest

from tests.slurm.conftest import HERE, WORK, Project


@pytest.mark.long
def test_the_tasks_of_an_array_share_the_runs_and_are_queued_again_alone(project: Project) -> None:
    """The ids begin at 3, in steps of 2. One task is warned: only that one is requeued, and finishes its runs."""
    overrides = (*HERE, *WORK, "rounds=2", "+model.seconds=0.1", "launch.nproc_per_node=1", "seed=1,2")
    job = project.submit("sweep.sbatch", *overrides, options=("--array=3-5:2",))
    first, second = f"{job}_3", f"{job}_5"
    project.wait_for(second, "running: seed=2")
    project.cluster.ask("scancel", "--signal=USR1", "--batch", second)
    project.cluster.start_again(second)
    assert (project.end_of(first).restarts, project.end_of(second).restarts) == (0, 1)
    assert "running: seed=2" not in project.out(first) and "running: seed=1" not in project.out(second)
    sweep = project.folder / "outputs/digits-sync" / f"sweep-{job}"
    states = {path.parent.name: json.loads(path.read_text())["status"] for path in sweep.glob("*/state.json")}
    assert states == {"seed=1": "finished", "seed=2": "finished"}
