"""The image, the Kubernetes job and the services of docs/deploy/, as far as can be seen without running them."""

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


def test_the_services_are_of_the_image_and_prometheus_asks_the_one_that_is_there() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    command = (FOLDER / "Dockerfile").read_text().splitlines()[0]
    assert f"--tag {services['silotrain']['image']} " in command and "serve" in services["silotrain"]["command"]
    asked = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"][0]
    (target,) = asked["targets"]
    host, port = target.split(":")
    assert any(ports.endswith(f":{port}") for ports in services[host]["ports"])
    by_triton, by_us = yaml.safe_load_all((FOLDER / "inferenceservice.yaml").read_text())
    (container,) = by_us["spec"]["predictor"]["containers"]
    assert container["image"] == services["silotrain"]["image"] and container["args"][0] == "serve"
    assert container["env"][0]["value"] == by_triton["spec"]["predictor"]["model"]["storageUri"]
