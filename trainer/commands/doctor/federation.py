"""Examination of a launch's part in a federation: a site's way to the coordinator, or the coordinator's own house."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from trainer.commands.doctor.checks import MAX_CLOCK_OFFSET_SECONDS, Diagnosis
from trainer.config.schema import Config
from trainer.federation.certificates import Credentials, load_credentials
from trainer.federation.handshake import shake_hands
from trainer.federation.link import COORDINATOR, Link
from trainer.federation.options import SiteOptions
from trainer.federation.probe import VERSIONS, LinkFacts, probe_link
from trainer.utils.text import format_bytes, format_seconds

T = TypeVar("T")


@dataclass
class FederationSurvey:
    """Results of an examination.

    Attributes:
        rows: what was found, and its name.
        diagnoses: problems.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    diagnoses: list[Diagnosis] = field(default_factory=list)

    def attempt(self, make: Callable[[], T]) -> T | None:
        """Return the result of `make`; None if it raises ValueError, which becomes a diagnosis."""
        try:
            return make()
        except ValueError as error:
            text, _, remedy = str(error).rpartition("\n  ")
            self.diagnoses.append(Diagnosis(True, text or str(error), remedy))
            return None

    def note(self, text: str, remedy: str) -> None:
        """Add a problem that would not stop a run."""
        self.diagnoses.append(Diagnosis(False, text, remedy))


def survey_federation(config: Config) -> FederationSurvey:
    """Examine the part of a launch in a federation, if it has one. Nobody counts it as a member meanwhile."""
    survey, site = FederationSurvey(), config.site
    if site.listen is not None:
        _survey_coordinator(survey, config)
    elif site.name is not None:
        _survey_site(survey, site)
    return survey


def _survey_coordinator(survey: FederationSurvey, config: Config) -> None:
    site = config.site
    _credentials(survey, site, COORDINATOR)
    if survey.attempt(lambda: _check_free(str(site.listen))):
        survey.rows.append(("listens at", f"{site.listen}, for {', '.join(site.members)}"))
    folder = Path(str(config.run_dir)).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    rounds, models = config.checkpoint.every_rounds + 1, len(site.members) + 1
    room = f"{models} models in each of {rounds} rounds: up to {format_bytes(free / rounds / models)} for a model"
    survey.rows.append(("spool", f"{format_bytes(free)} are free; {room}"))


def _survey_site(survey: FederationSurvey, site: SiteOptions) -> None:
    name, server = str(site.name), str(site.server)
    credentials = _credentials(survey, site, name)
    if credentials is None:
        return
    address = urlsplit(f"//{server}")
    folder = Path(str(site.certificates)).expanduser()
    way = survey.attempt(lambda: shake_hands(str(address.hostname), int(address.port or 0), folder, name))
    if way is None:
        return
    survey.rows.append((COORDINATOR, way))
    facts = survey.attempt(lambda: _probe(server, credentials))
    if facts is not None:
        _survey_link(survey, facts)


def _survey_link(survey: FederationSurvey, facts: LinkFacts) -> None:
    """Report what a probe has found."""
    survey.rows += [
        (
            "up, down",
            f"{format_bytes(facts.up)}/s, {format_bytes(facts.down)}/s, {format_seconds(facts.latency)} a message",
        ),
        ("its clock", f"{facts.clock_offset:+.3f} s"),
        ("its versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
    ]
    if abs(facts.clock_offset) > MAX_CLOCK_OFFSET_SECONDS:
        survey.note(
            f"the coordinator's clock is {facts.clock_offset:+.1f} s off this one: logs mislead, and certificates "
            "expire by both",
            "start an NTP service on both hosts",
        )
    for package, version in VERSIONS.items():
        if facts.versions.get(package) != version:
            survey.note(
                f"{package} is {facts.versions.get(package)} at the coordinator, and {version} here",
                "install one version everywhere, for results that are the same to the last bit",
            )


def _credentials(survey: FederationSurvey, site: SiteOptions, name: str) -> Credentials | None:
    """Load the certificates of this launch, and report until when they are valid."""
    credentials = survey.attempt(lambda: load_credentials(Path(str(site.certificates)).expanduser(), name))
    if credentials is None:
        return None
    survey.rows.append(("certificates", f"of {name}, valid until {credentials.expires:%Y-%m-%d}"))
    if warning := credentials.expiry_warning():
        text, _, remedy = warning.partition("\n  ")
        survey.note(text, remedy)
    return credentials


def _check_free(listen: str) -> bool:
    """Check that the coordinator could listen at its address; return True.

    Raises:
        ValueError: it could not.
    """
    address = urlsplit(f"//{listen}")
    try:
        family, _, _, _, place = socket.getaddrinfo(address.hostname, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            candidate.bind(place)
    except OSError as error:
        raise ValueError(
            f"site.listen={listen} cannot be had: {error.strerror}\n"
            "  choose an address of this host, such as 0.0.0.0, and a free port; or end the program that has it"
        ) from error
    return True


def _probe(server: str, credentials: Credentials) -> LinkFacts:
    link = Link(server, credentials, 0.0)
    try:
        return probe_link(link.channel)
    finally:
        link.channel.close()
