"""Survey of the hosts by all ranks, gathered on rank 0.

Each rank collects facts, and the first rank of each node pings the others.

All of it goes through the store that the launcher opened. The ranks' own connections are tried last, and only if the
nodes have reached each other: torch waits for minutes for connections that cannot be made.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.commands.doctor.run_dir_check import RunDirView, inspect_run_dir, marker_file
from trainer.commands.probe.connectivity import PingResult, ping_all, serve_pings
from trainer.commands.probe.host_facts import HostFacts, collect_host_facts
from trainer.commands.probe.link_bandwidth import Link, measure_links
from trainer.commands.probe.network_interfaces import gloo_interface
from trainer.commands.probe.watchdog import watchdog
from trainer.config.schema import Config
from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.topology import broadcast_via_store, distributed

RESPONSE_TIMEOUT_SECONDS = 60  # for the facts of all ranks
LINK_TIMEOUT_SECONDS = 120
COLLECTIVE_TIMEOUT_SECONDS = 30  # of a single collective


@dataclass
class HostSurvey:
    """Results of a survey, complete on rank 0.

    Attributes:
        facts: of all ranks.
        pings: results of each node's first rank, by node.
        views: of the run folder, by node.
        links: None if they were not measured; `links_error` tells why a connection failed.
    """

    facts: list[HostFacts] = field(default_factory=list)
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


def survey_hosts(config: Config, environment: ClusterEnvironment, store: Any) -> HostSurvey:
    """Survey the hosts. Every rank calls this; the survey is complete on rank 0.

    Raises:
        ValueError: bad input on any rank. It is raised on all of them.
    """
    survey = HostSurvey()
    late = f"rank {environment.rank}: the ranks have not answered in {RESPONSE_TIMEOUT_SECONDS} s"
    with ExitStack() as stack, watchdog(RESPONSE_TIMEOUT_SECONDS, late):

        def plan_pings() -> str:
            return json.dumps(_plan_pings(survey, config, environment, store, stack))

        store.set(f"facts/{environment.rank}", _collect_facts(config, environment))
        plan = json.loads(broadcast_via_store(store, "plan", environment, plan_pings))
        if "errors" in plan:
            raise ValueError(plan["errors"])
        if environment.local_rank == 0:
            others = {int(node): address for node, address in plan["nodes"].items() if int(node) != environment.node}
            view = inspect_run_dir(Path(str(config.run_dir)), plan["marker"])
            store.set(f"view/{environment.node}", json.dumps([ping_all(others), view]))
        connected = broadcast_via_store(
            store, "connected", environment, lambda: _gather_views(survey, plan["nodes"], store)
        )
    if connected == "yes":
        _measure_links(survey, config, environment, store)
    return survey


def _collect_facts(config: Config, environment: ClusterEnvironment) -> str:
    try:
        port = serve_pings(gloo_interface().address, environment.node) if environment.local_rank == 0 else 0
        return json.dumps(asdict(collect_host_facts(config, environment, port)))
    except ValueError as error:
        return json.dumps({"error": str(error)})


def _plan_pings(
    survey: HostSurvey, config: Config, environment: ClusterEnvironment, store: Any, stack: ExitStack
) -> dict[str, Any]:
    """Gather the facts on rank 0.

    Returns where each node listens, and the name of the marker file beside the run folder.
    """
    ranks = [json.loads(store.get(f"facts/{rank}")) for rank in range(environment.world_size)]
    if errors := dict.fromkeys(facts["error"] for facts in ranks if "error" in facts):
        return {"errors": "\n".join(errors)}
    survey.facts = [HostFacts(**facts) for facts in ranks]
    marker = stack.enter_context(marker_file(Path(str(config.run_dir))))
    return {"nodes": {facts.node: (facts.address, facts.port) for facts in survey.first_ranks}, "marker": marker}


def _gather_views(survey: HostSurvey, nodes: dict[str, Any], store: Any) -> str:
    """Gather the views of the nodes on rank 0.

    Returns whether all nodes have reached each other.
    """
    for node in map(int, nodes):
        results, view = json.loads(store.get(f"view/{node}"))
        survey.pings[node] = [PingResult(*result) for result in results]
        survey.views[node] = RunDirView(*view)
    return "no" if survey.unreachable else "yes"


def _measure_links(survey: HostSurvey, config: Config, environment: ClusterEnvironment, store: Any) -> None:
    """Measure the links of the process groups that a run would open."""
    stuck = f"rank {environment.rank}: the connections between the ranks are stuck after {LINK_TIMEOUT_SECONDS} s"
    launch = config.launch
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
