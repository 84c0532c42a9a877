"""The batch scripts of slurm/, without SLURM: shellcheck, the lines to edit, and the messages outside a job."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def test_they_are_all_there() -> None:
    assert [script.stem for script in SCRIPTS] == ["federated", "sweep", "train"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    checked = subprocess.run(
        ["shellcheck", "--external-sources", *SCRIPTS, FOLDER / "job.sh"],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
    )
    assert (checked.returncode, checked.stdout) == (0, "")


@scripts
def test_what_a_site_must_change_is_marked(script: Path) -> None:
    lines = script.read_text().splitlines()
    marked = {line.split("=")[0].split("--")[1] for line in lines if "# EDIT" in line}
    assert {"time", "signal"} <= marked
    assert {line.split()[1] for line in lines if line.startswith("#SBATCH")} >= {"--requeue", "--open-mode=append"}


@scripts
def test_they_ask_for_nothing_that_only_some_clusters_have(script: Path) -> None:
    """A job that wants GPUs, or more cores than a node has, would wait forever or be refused."""
    asked = {line.split()[1].split("=")[0] for line in script.read_text().splitlines() if line.startswith("#SBATCH")}
    assert not asked & {"--gres", "--gpus-per-node", "--cpus-per-task", "--partition", "--account", "--mem"}


@scripts
def test_outside_a_job_they_say_how_to_submit_them(script: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", f"slurm/{script.name}", "rounds=3"]
    ended = subprocess.run(command, cwd=FOLDER.parent, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.endswith(f"  sbatch slurm/{script.name} rounds=3\n"), ended.stderr
