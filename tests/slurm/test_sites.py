"""A SLURM job that is a site of a federation, preempted and queued again while the others go on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.slurm.conftest import HERE, Project
from tests.support.cluster import free_ports
from trainer.federation.certificates import certify

pytestmark = pytest.mark.long

ROUNDS = 90
OVERRIDES = (
    *HERE,
    *("data=npz", "data.classes=10", "model=custom", "model._target_=own.Small", "+model.seconds=0.02"),
    *("algorithm=fedavg", f"rounds={ROUNDS}", "round.steps=20", "batch_size=16"),
    *("site.certificates=certs", "site.grace_seconds=1", "site.min_members=1", "launch.nproc_per_node=1"),
)


@contextmanager
def started(project: Project, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a launch beside the cluster, on this machine."""
    with (project.folder / f"{arguments[-1]}.txt").open("w") as out:
        command = [sys.executable, "-m", "trainer", *arguments]
        environment = project.cluster.environment
        process = subprocess.Popen(command, cwd=project.folder, env=environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def trained(run: Path) -> list[int]:
    """Return the number of sites in each round of a run."""
    return [json.loads(line)["clients/trained"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_job_that_is_a_site_is_preempted_and_counted_again(new_project: Callable[[], Project]) -> None:
    """It saves in the middle of a round, the others go on after the grace, and it is back in the next version."""
    project, (port,) = new_project(), free_ports(1)
    certify(project.folder / "certs", ["coordinator", "berlin", "paris"])
    for seed, name in enumerate(("berlin", "paris")):
        random = np.random.default_rng(seed)
        images = random.normal(size=(300, 1, 8, 8)).astype(np.float32)
        np.savez(project.folder / f"{name}.npz", x=images, y=random.integers(0, 10, 300))
    own = (f"site.server=localhost:{port}", "site.name={0}", "data.path={0}.npz", "run_dir={0}")
    berlin, paris = ([key.format(name) for key in own] for name in ("berlin", "paris"))
    coordinator = ("coordinator", *OVERRIDES, f"site.listen=localhost:{port}", "site.members=[berlin,paris]")
    with started(project, *coordinator, "run_dir=center") as center, started(project, *OVERRIDES, *paris) as other:
        job = project.submit("train.sbatch", *OVERRIDES, *berlin, options=("--nodes=1",))
        project.wait_for(job, f"round  2/{ROUNDS}")
        project.cluster.ask("scancel", "--signal=USR1", "--batch", job)
        project.cluster.wait_for(job, lambda job: job.state == "PENDING")
        state = json.loads((project.folder / "berlin/state.json").read_text())
        assert state["status"] == "preempted"
        alone_since = len(trained(project.folder / "center"))
        project.cluster.start_again(job)
        assert project.end_of(job, 120).restarts == 1
        assert center.wait(60) == other.wait(60) == 0
    sites = trained(project.folder / "center")
    assert len(sites) == ROUNDS
    assert 1 in sites[alone_since - 1 :] and sites[-1] == 2, sites
    said = (project.folder / "run_dir=center.txt").read_text()
    assert ": berlin is away, the others go on\n" in said and ": berlin is back\n" in said
    back = trained(project.folder / "berlin")
    assert len(back) < ROUNDS, "it has missed rounds"
    assert (project.folder / "center/model.safetensors").exists()
    weights = [project.weights(project.folder / name) for name in ("center", "berlin", "paris")]
    assert weights[0] == weights[1] == weights[2]
