"""The image and the Kubernetes job of docs/deploy/, as far as can be seen without running them."""

from __future__ import annotations

import re
import shlex

import yaml

from tests.cli.command import ROOT
from trainer.config.compose import compose_tree

FOLDER = ROOT / "docs/deploy"


def test_the_image_copies_what_there_is_and_runs_as_a_user() -> None:
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", next(line[1] for line in lines if line[0] == "FROM"))
    copied = [source for line in lines if line[0] == "COPY" for source in line[1:-1]]
    assert copied and not [source for source in copied if not (ROOT / source).exists()]
    assert [line[1] for line in lines if line[0] == "USER"] == ["10001"]


def test_the_job_is_one_of_its_runtime_with_a_valid_configuration() -> None:
    volume, runtime, job = yaml.safe_load_all((FOLDER / "trainjob.yaml").read_text())
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes.keys()
    arguments = [one.replace("$(PET_MASTER_ADDR)", "node0") for one in job["spec"]["trainer"]["args"]]
    tree = compose_tree(arguments)
    assert tree["launch"]["nodes"] == job["spec"]["trainer"]["numNodes"] and tree["launch"]["rdzv_endpoint"]
