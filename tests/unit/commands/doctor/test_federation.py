"""The doctor of a site and of a coordinator, against a real coordinator on loopback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.folders import composed_tree
from tests.unit.commands.doctor.test_doctor import world
from tests.unit.federation.test_certificates import at
from tests.unit.federation.test_handshake import Nobody
from trainer.commands.doctor.console import show
from trainer.commands.doctor.federation import FederationSurvey, survey_federation
from trainer.config.schema import read_config
from trainer.federation import probe
from trainer.federation.certificates import certify, load_credentials
from trainer.federation.registry import Registry
from trainer.federation.server import Server
from trainer.federation.spool import Spool


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "FILL_SECONDS", 0.05)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation") / "certs"
    certify(folder, ["coordinator", "berlin", "rome"])
    return folder


@pytest.fixture
def server(certs: Path, tmp_path: Path) -> Iterator[Server]:
    """A coordinator whose only member is berlin."""
    registry = Registry(Spool(tmp_path / "meetings"), ["berlin"])
    server = Server("127.0.0.1:0", load_credentials(certs, "coordinator"), registry, Nobody())
    yield server
    server.stop(0)


def survey(*overrides: str) -> FederationSurvey:
    return survey_federation(read_config(dict(composed_tree(("run_dir=nowhere/run", "algorithm=fedavg", *overrides)))))


def site(certs: Path, port: int, name: str = "berlin") -> FederationSurvey:
    return survey(f"site.name={name}", f"site.server=localhost:{port}", f"site.certificates={certs}")


def coordinator(certs: Path, listen: str) -> FederationSurvey:
    return survey(f"site.listen={listen}", "site.members=[berlin,rome]", f"site.certificates={certs}")


def test_a_run_of_one_launch_has_no_part_in_a_federation() -> None:
    assert survey() == FederationSurvey()


def test_a_site_whose_way_is_free(certs: Path, server: Server) -> None:
    found = site(certs, server.port)
    assert found.diagnoses == []
    rows = dict(found.rows)
    assert rows["coordinator"] == f"localhost:{server.port}, TLSv1.3"
    assert rows["certificates"].startswith("of berlin, valid until 20")
    assert rows["up, down"].count("B/s") == 2 and "silotrain" in rows["its versions"]
    assert server.registry.present() == [] and not server.registry.meetings
    console = Console(file=StringIO(), width=160)
    show(world(nodes=1), found.rows, [], console)
    assert f"coordinator    localhost:{server.port}, TLSv1.3" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_each_step_that_fails_is_the_last(certs: Path, server: Server, tmp_path: Path) -> None:
    (diagnosis,) = site(tmp_path / "nowhere", server.port).diagnoses
    assert diagnosis.is_error and "berlin.pem cannot be read" in diagnosis.text
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (diagnosis,) = site(certs, free.getsockname()[1]).diagnoses
    assert "nothing listens at" in diagnosis.text and "start the coordinator" in diagnosis.remedy
    (diagnosis,) = site(certs, server.port, "rome").diagnoses
    assert diagnosis.is_error and "rome is no member" in diagnosis.text and diagnosis.remedy == "valid: berlin"


def test_clocks_and_versions_that_differ_have_notes(
    certs: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = probe.probe_link

    def elsewhere(channel):
        facts = real(channel)
        return probe.LinkFacts(facts.latency, 90.0, facts.up, facts.down, {**facts.versions, "torch": "2.11.0"})

    monkeypatch.setattr("trainer.commands.doctor.federation.probe_link", elsewhere)
    clock, version = site(certs, server.port).diagnoses
    assert not clock.is_error and "the coordinator's clock is +90.0 s off this one" in clock.text
    assert not version.is_error and version.text.startswith("torch is 2.11.0 at the coordinator, and 2.")


def test_certificates_that_expire_soon_have_a_note(
    certs: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, days=355)
    (diagnosis,) = site(certs, server.port).diagnoses
    assert not diagnosis.is_error and "the certificates of berlin are valid until" in diagnosis.text
    assert "certify ... berlin --renew" in diagnosis.remedy


def test_a_coordinator_needs_its_certificates_its_port_and_disk(certs: Path, server: Server, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    found = coordinator(certs, address)
    assert found.diagnoses == []
    rows = dict(found.rows)
    assert rows["listens at"] == f"{address}, for berlin, rome"
    assert "3 models in each of 2 rounds: up to" in rows["spool"]
    taken, missing = coordinator(tmp_path / "nowhere", f"127.0.0.1:{server.port}").diagnoses[::-1]
    assert f"site.listen=127.0.0.1:{server.port} cannot be had: Address already in use" in taken.text
    assert "coordinator.pem cannot be read" in missing.text
    (foreign,) = coordinator(certs, "192.0.2.1:7070").diagnoses
    assert "cannot be had: Cannot assign requested address" in foreign.text
