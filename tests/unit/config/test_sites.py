"""A launch's part in a federation: refusals that the configuration alone shows, and what it leaves open."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.refusals import assert_says, composing
from trainer.config.compose import compose_tree

FEDAVG = ["algorithm=fedavg"]
SITE = [*FEDAVG, "site.name=berlin", "site.server=localhost:7070", "site.certificates=certs"]
COORDINATOR = [
    *(*FEDAVG, "site.listen=0.0.0.0:7070", "site.members=[berlin,paris]"),
    *("site.certificates=certs", "data=npz", "model=mlp"),
]
SIMULATION = [*FEDAVG, "site.simulate=2"]

# Overrides, and the parts of the message.
REFUSED = {
    "an address of nobody": (["site.server=host:7070"], ["site.server=host:7070 without site.name", "set site.name="]),
    "members of nobody": (["site.members=[a,b]"], ["without site.listen", "python -m trainer coordinator"]),
    "no address": (["site.name=berlin"], ["site.server=null", "valid: host:port of the coordinator"]),
    "no port": ([*SITE, "site.server=host"], ["site.server=host\n", "valid: host:port"]),
    "a port that is none": ([*SITE, "site.server=host:70700"], ["site.server=host:70700"]),
    "a URL": ([*SITE, "site.server='https://host:7070'"], ["site.server=https://host:7070", "valid: host:port"]),
    "a site without certificates": ([*SITE, "site.certificates=null"], ["without site.certificates", "berlin.key"]),
    "both parts": ([*SITE, "site.listen=localhost:7070"], ["site.name=berlin with site.listen=localhost:7070"]),
    "no name of a certificate": ([*SITE, "site.name=St_Mary"], ["site.name=St_Mary", "lower-case letters"]),
    "the coordinator's name": ([*SITE, "site.name=coordinator"], ["site.name=coordinator", "give the site another"]),
    "files of a site": ([*SITE, "data=npz", "data.files=[a,b]"], ["data.files=[a,b]", "data.path="]),
    "a loss that stays": (
        [*SITE, "algorithm=averaging", "site.allow=[labels]"],
        ["site.allow=[labels]", "ModelAveraging", "add training to site.allow", "set algorithm=fedavg"],
    ),
    "a partition of a site": (
        [*SITE, "partition=dirichlet", "partition.alpha=1"],
        ["Dirichlet", "leave partition= out"],
    ),
    "clients of a site": ([*SITE, "clients=10"], ["clients=10", "a site is one client", "leave clients= out"]),
    "silos of a site": ([*SITE, "silos=2"], ["silos=2", "a site is one silo", "set silos=1"]),
    "sizes of the silos of a site": ([*SITE, "silos=[1,1]"], ["silos=[1,1]", "set silos=1"]),
    "parts of a site": ([*SITE, "silo.shard=full"], ["silo.shard=full", "sends the model whole", "set silo.shard=1"]),
    "no algorithm of sites": ([*SITE, "algorithm=sync"], ["Sync", "one world", "set algorithm=fedavg"]),
    "an algorithm in mid-round": ([*SITE, "algorithm=streaming"], ["Streaming", "set algorithm=fedavg"]),
    "its other name": ([*SITE, "algorithm=delayed"], ["Streaming", "set algorithm=fedavg"]),
    "a compression in two steps": (
        [*SITE, "update_compression=powersgd"],
        ["PowerSGD", "one world", "set update_compression=int8"],
    ),
    "updates in another unit": (
        [*SITE, "algorithm=fednova", "update_compression=int8"],
        ["Int8", "FedNova", "unit of its updates", "set update_compression=fp32"],
    ),
    "newcomers to personal layers": (
        [*SITE, "algorithm=fedbn", "client_sampling=sample", "client_sampling.clients_per_round=1"],
        ["algorithm.shared_params=", "UniformSampler", "set client_sampling=all"],
    ),
    "late sites with personal layers": (
        [*COORDINATOR, "algorithm=fedbn", "site.min_members=1"],
        ["algorithm.shared_params=", "site.grace_seconds=30", "site.grace_seconds=null"],
    ),
    "no port to listen at": ([*COORDINATOR, "site.listen=localhost"], ["site.listen=localhost\n", "valid: host:port"]),
    "any port": ([*COORDINATOR, "site.listen=localhost:0"], ["site.listen=localhost:0\n"]),
    "no port to be watched at": ([*COORDINATOR, "site.monitor=host"], ["site.monitor=host\n", "valid: host:port"]),
    "a monitor of a site": ([*SITE, "site.monitor=localhost:1"], ["site.monitor=localhost:1 without site.listen"]),
    "a monitor of nobody": (["site.monitor=localhost:1"], ["without site.listen", "leave site.monitor= out"]),
    "nobody to meet": ([*COORDINATOR, "site.members=[]"], ["site.members=[]", "[berlin,paris]"]),
    "a coordinator without certificates": (
        [*COORDINATOR, "site.certificates=null"],
        ["without site.certificates", "certify"],
    ),
    "names of members": ([*COORDINATOR, "site.members=[b_1,a,a]"], ["b_1 is no name", "a is named twice"]),
    "a member of the coordinator's name": ([*COORDINATOR, "site.members=[a,coordinator]"], ["coordinator is the name"]),
    "more members than there are": ([*COORDINATOR, "site.min_members=3"], ["site.min_members=3", "valid: 1 to 2"]),
    "workers of a coordinator": ([*COORDINATOR, "launch.nproc_per_node=2"], ["launch.nproc_per_node=2", "one process"]),
    "nodes of a coordinator": ([*COORDINATOR, "launch.nodes=2"], ["launch.nodes=2", "one process"]),
    "clients of a coordinator": ([*COORDINATOR, "clients=3"], ["clients=3", "set clients=2"]),
    "names of a simulation": ([*SIMULATION, "site.members=[a,b,c]"], ["site.members=[a,b,c]", "site.simulate=3"]),
    "files of a simulation": ([*SIMULATION, "data=npz", "data.files=[a]"], ["data.files=[a]", "site.simulate=1"]),
    "clients of a simulation": ([*SIMULATION, "clients=3"], ["clients=3", "set clients=2"]),
    "nodes of a simulation": ([*SIMULATION, "launch.nodes=2"], ["launch.nodes=2", "on this machine"]),
    "silos of a simulation": ([*SIMULATION, "silos=2"], ["silos=2", "set silos=1"]),
    "no sites": (["site.simulate=0"], ["site.simulate=0", "from 1"]),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_sites_cannot_do_is_refused_by_the_configuration(overrides: list[str], message: list[str]) -> None:
    assert_says(composing(overrides), message)


def test_all_that_a_site_cannot_do_is_listed_at_once() -> None:
    wrong = ["site.name=berlin", "silos=2", "clients=3", "update_compression=powersgd"]
    message = composing(wrong)
    assert_says(message, ["site.server=null", "site.certificates", "silos=2", "clients=3", "Sync", "PowerSGD"])


def test_a_coordinator_needs_no_data_and_is_one_process() -> None:
    tree = compose_tree(COORDINATOR)
    assert (tree["data"]["path"], tree["launch"]["nproc_per_node"]) == (None, 1)


def test_a_site_needs_data() -> None:
    assert_says(composing([*SITE, "data=npz", "model=mlp"]), ["data.path has no value"])


def test_a_simulation_names_its_sites_and_deals_a_client_to_each() -> None:
    tree = compose_tree([*SIMULATION, "partition=dirichlet", "partition.alpha=1"])
    assert (tree["site"]["members"], tree["clients"]) == (["site-0", "site-1"], 2)
    assert compose_tree([*SIMULATION, "site.members=[berlin,paris]"])["site"]["members"] == ["berlin", "paris"]


@pytest.mark.parametrize("members", [[], SITE, COORDINATOR, SIMULATION])
def test_the_number_of_clients_of_a_run_that_is_resumed_stays(members: list[str], tmp_path: Path) -> None:
    """config.yaml has the number that the run began with."""
    overrides = [*members, f"run_dir={tmp_path}"]
    (tmp_path / "config.yaml").write_text("clients: 7\n")
    assert compose_tree([*overrides, "clients=7"])["clients"] == 7


def test_sampling_of_sites_and_parts_of_a_model_are_allowed() -> None:
    compose_tree([*SITE, "client_sampling=sample", "client_sampling.clients_per_round=1"])
    compose_tree([*SITE, "algorithm=fedbn"])
    compose_tree([*SITE, "algorithm=local", "client_sampling=sample", "client_sampling.clients_per_round=1"])
