"""The image, the Kubernetes job and the services of docs/deploy/, as far as can be seen without running them."""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml

from tests.cli.command import ROOT
from trainer.commands.exit_codes import BAD_INPUT
from trainer.config.compose import compose_tree
from trainer.federation.membership import _compared

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


def test_the_services_of_a_federation_are_its_members_and_agree() -> None:
    content = yaml.safe_load((FOLDER / "federation.compose.yaml").read_text())
    services = content["services"]
    coordinator, sites = services.pop("coordinator"), services
    members = compose_member(coordinator["command"])["site"]["members"]
    assert members == [compose_member(site["command"])["site"]["name"] for site in sites.values()] == list(sites)
    trees = [compose_member(service["command"]) for service in (coordinator, *sites.values())]
    assert len({yaml.safe_dump(_compared(tree)) for tree in trees}) == 1
    assert len({tree["run_dir"] for tree in trees}) == len(trees)
    (published, monitored) = coordinator["ports"]
    assert published == "7070:7070" and trees[0]["site"]["listen"].endswith(":7070")
    assert monitored.startswith("127.0.0.1:") and trees[0]["site"]["monitor"].endswith(":9090")
    for name, service in {"coordinator": coordinator, **sites}.items():
        assert f"--tag {service['image']} " in (FOLDER / "Dockerfile").read_text().splitlines()[0]
        files = {each["target"]: content["secrets"][each["source"]]["file"] for each in service["secrets"]}
        assert files == {file: f"./certs/{file}" for file in ("ca.pem", f"{name}.pem", f"{name}.key")}
        assert "ports" not in service or name == "coordinator"


def test_the_manifest_of_a_federation_has_the_files_and_ports_of_its_members() -> None:
    documents = list(yaml.safe_load_all((FOLDER / "federation.yaml").read_text()))
    kinds = {}
    for document in documents:
        kinds.setdefault(document["kind"], []).append(document)
    (service,), (policy,) = kinds["Service"], kinds["NetworkPolicy"]
    claims = {claim["metadata"]["name"] for claim in kinds["PersistentVolumeClaim"]}
    trees = []
    for job in kinds["Job"]:
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        trees.append(tree := compose_member(container["args"]))
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert volumes["run"]["persistentVolumeClaim"]["claimName"] in claims
        assert volumes["certificates"]["secret"]["defaultMode"] == 0o440
        assert volumes["certificates"]["secret"]["secretName"] == job["metadata"]["name"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert tree["site"]["certificates"] == mounts["certificates"]
        (failed, _) = job["spec"]["podFailurePolicy"]["rules"]
        assert failed["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [BAD_INPUT]}
    labels = kinds["Job"][0]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == labels
    ports = {each["containerPort"] for each in kinds["Job"][0]["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {int(trees[0]["site"][key].rpartition(":")[2]) for key in ("listen", "monitor")}
    assert [each["port"] for each in service["spec"]["ports"]] == [7070]
    assert trees[1]["site"]["name"] in trees[0]["site"]["members"]
    assert len({yaml.safe_dump(_compared(tree)) for tree in trees}) == 1


def compose_member(arguments: list[str]) -> dict[str, Any]:
    """Return the configuration of a member; the coordinator's begins with its command."""
    return compose_tree([one for one in arguments if one != "coordinator"])
