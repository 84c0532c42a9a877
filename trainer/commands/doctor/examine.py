"""Survey of the hosts by all ranks.

Each rank collects facts, and the first rank of each node pings the others.

All of it goes through the store that the launcher opened. The ranks' own connections are tried last, and only if the
nodes have reached each other: torch waits for minutes for connections that cannot be made.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.shared_storage import visible_nodes
from trainer.commands.probe.host_facts import HostFacts, collect_host_facts
from trainer.commands.probe.link_bandwidth import Link, measure_links
from trainer.commands.probe.network import PingResult, gloo_interface, ping_all, serve_pings
from trainer.commands.probe.watchdog import watchdog
from trainer.config.schema import Config
from trainer.distributed.peers import Peers
from trainer.distributed.topology import distributed

RESPONSE_TIMEOUT_SECONDS = 60  # for the facts of all ranks
LINK_TIMEOUT_SECONDS = 120
COLLECTIVE_TIMEOUT_SECONDS = 30  # of a single collective


class RunDirView(NamedTuple):
    """A node's view of the run folder: is it that of rank 0, and can it be written?

    `error` tells why it cannot be written; it is empty if it can.
    """

    is_same: bool
    error: str


@dataclass
class HostSurvey:
    """Results of a survey.

    Attributes:
        facts: of all ranks.
        pings: results of each node's first rank, by node.
        views: of the run folder, by node.
        links: None if they were not measured; `links_error` tells why a connection failed.
    """

    facts: list[HostFacts]
    pings: dict[int, list[PingResult]] = field(default_factory=dict)
    views: dict[int, RunDirView] = field(default_factory=dict)
    links: list[Link] | None = None
    links_error: str = ""

    @property
    def first_ranks(self) -> list[HostFacts]:
        """Facts of the first rank of each node."""
        return [facts for facts in self.facts if facts.port]

    @property
    def unreachable(self) -> list[tuple[HostFacts, HostFacts, str]]:
        """Pairs of nodes of which the first has not reached the second, and why."""
        nodes = {facts.node: facts for facts in self.first_ranks}
        return [
            (nodes[node], nodes[result.node], result.error)
            for node, results in self.pings.items()
            for result in results
            if result.error
        ]


def survey_hosts(config: Config, peers: Peers) -> HostSurvey:
    """Survey the hosts. All ranks must call it.

    Raises:
        ValueError: bad input on any rank. It is raised on all of them.
    """
    environment, run_dir = peers.environment, Path(str(config.run_dir))

    def collect() -> dict[str, object]:
        port = 0 if environment.local_rank else serve_pings(gloo_interface().address, environment.node)
        return asdict(collect_host_facts(config, environment, port))

    def view() -> tuple[list[PingResult], RunDirView] | None:
        if environment.local_rank:
            return None
        others = [facts for facts in survey.first_ranks if facts.node != environment.node]
        pings = ping_all({facts.node: (facts.address, facts.port) for facts in others})
        return pings, inspect_run_dir(run_dir, marker)

    late = f"rank {peers.rank}: the ranks have not answered in {RESPONSE_TIMEOUT_SECONDS} s"
    with ExitStack() as stack, watchdog(RESPONSE_TIMEOUT_SECONDS, late):
        survey = HostSurvey([HostFacts(**facts) for facts in peers.all_gather("facts", collect)])
        marker = peers.broadcast("marker", lambda: stack.enter_context(marker_file(run_dir)))
        views = peers.all_gather("views", view)
    for facts in survey.first_ranks:
        pings, seen = views[facts.rank]
        survey.pings[facts.node] = [PingResult(*result) for result in pings]
        survey.views[facts.node] = RunDirView(*seen)
    if not survey.unreachable:
        _measure_links(survey, config, peers)
    return survey


def _measure_links(survey: HostSurvey, config: Config, peers: Peers) -> None:
    """Measure the links of the process groups that a run would open."""
    stuck = f"rank {peers.rank}: the connections between the ranks are stuck after {LINK_TIMEOUT_SECONDS} s"
    launch, environment, store = config.launch, peers.environment, peers.store
    limits = (COLLECTIVE_TIMEOUT_SECONDS, COLLECTIVE_TIMEOUT_SECONDS, launch.inter_silo_backend)
    try:
        with (
            watchdog(LINK_TIMEOUT_SECONDS, stuck),
            distributed(config.silos, environment, store, launch.device, *limits, backend=launch.backend) as silos,
            distributed("node", environment, device=launch.device, backend=launch.backend) as hosts,
        ):
            survey.links = measure_links(silos, hosts)
    except RuntimeError as error:
        survey.links_error = str(error).splitlines()[0]


@contextmanager
def marker_file(folder: Path) -> Iterator[str]:
    """Create a file beside the folder, yield its name, and remove it at the end.

    The name is empty if the file cannot be created.
    """
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    marker = folder.absolute().parent / f".{folder.name}-{uuid.uuid4().hex}"
    with suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    try:
        yield marker.name if marker.exists() else ""
    finally:
        with suppress(OSError):  # it could not be created, or others have written there meanwhile
            marker.unlink(missing_ok=True)
            for parent in missing:
                parent.rmdir()


def inspect_run_dir(folder: Path, marker: str) -> RunDirView:
    """Return this node's view of the folder, beside which rank 0 has left a marker."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    error_text = ""
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        error_text = f"{existing}: {error.strerror}"
    is_same = bool(marker and visible_nodes({0: folder.absolute().parent / marker}))
    return RunDirView(is_same, error_text)
