"""The examination: every rank says what it finds, the first of every node asks the others, rank 0 puts it together.

All of it goes through the store that the launcher opened. The ranks' own connections, which wait for minutes where they
cannot be made, are tried last, and only if the nodes have reached each other.
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

RESPONSE_TIMEOUT_SECONDS = 60  # for all ranks to say what they find
LINK_TIMEOUT_SECONDS = 120
COLLECTIVE_TIMEOUT_SECONDS = 30  # for one collective


@dataclass
class HostSurvey:
    """What was found, on rank 0. heard and views: by node. links: None when they were not measured, and why not."""

    facts: list[HostFacts] = field(default_factory=list)
    pings: dict[int, list[PingResult]] = field(default_factory=dict)
    views: dict[int, RunDirView] = field(default_factory=dict)
    links: list[Link] | None = None
    links_error: str = ""

    @property
    def first_ranks(self) -> list[HostFacts]:
        """The facts of the first rank of each node, which speaks for it."""
        return [facts for facts in self.facts if facts.port]

    @property
    def unreachable(self) -> list[tuple[HostFacts, HostFacts, str]]:
        """Nodes that have not reached others: from, to, why."""
        nodes = {facts.node: facts for facts in self.first_ranks}
        return [
            (nodes[node], nodes[heard.node], heard.error)
            for node, all_heard in self.pings.items()
            for heard in all_heard
            if heard.error
        ]


def survey_hosts(config: Config, environment: ClusterEnvironment, store: Any) -> HostSurvey:
    """What all ranks found; complete on rank 0 alone. Every rank calls it. Raises ValueError, on all, for bad input."""
    exam, stack = HostSurvey(), ExitStack()
    with (
        stack,
        watchdog(
            RESPONSE_TIMEOUT_SECONDS,
            f"rank {environment.rank}: the ranks have not answered in {RESPONSE_TIMEOUT_SECONDS} s",
        ),
    ):
        store.set(f"facts/{environment.rank}", _own_facts(config, environment))
        plan = json.loads(
            broadcast_via_store(
                store, "plan", environment, lambda: json.dumps(_plan_pings(exam, config, environment, store, stack))
            )
        )
        if "faults" in plan:
            raise ValueError(plan["faults"])
        if environment.local_rank == 0:
            others = {int(node): where for node, where in plan["nodes"].items() if int(node) != environment.node}
            view = inspect_run_dir(Path(str(config.run_dir)), plan["mark"])
            store.set(f"view/{environment.node}", json.dumps([ping_all(others), view]))
        fit = broadcast_via_store(store, "fit", environment, lambda: _collect_views(exam, plan["nodes"], store))
    if fit == "yes":
        _measure(exam, config, environment, store)
    return exam


def _own_facts(config: Config, environment: ClusterEnvironment) -> str:
    try:
        port = serve_pings(gloo_interface().address, environment.node) if environment.local_rank == 0 else 0
        return json.dumps(asdict(collect_host_facts(config, environment, port)))
    except ValueError as error:
        return json.dumps({"fault": str(error)})


def _plan_pings(
    survey: HostSurvey, config: Config, environment: ClusterEnvironment, store: Any, stack: ExitStack
) -> dict[str, Any]:
    """Rank 0 hears all, and says where each node listens and which file lies beside the run folder."""
    told = [json.loads(store.get(f"facts/{rank}")) for rank in range(environment.world_size)]
    if errors := dict.fromkeys(facts["fault"] for facts in told if "fault" in facts):
        return {"faults": "\n".join(errors)}
    survey.facts = [HostFacts(**facts) for facts in told]
    mark = stack.enter_context(marker_file(Path(str(config.run_dir))))
    return {"nodes": {facts.node: (facts.address, facts.port) for facts in survey.first_ranks}, "mark": mark}


def _collect_views(survey: HostSurvey, nodes: dict[str, Any], store: Any) -> str:
    """Whether the ranks can make connections of their own, when rank 0 has heard what the nodes have seen."""
    for node in map(int, nodes):
        heard, view = json.loads(store.get(f"view/{node}"))
        survey.pings[node] = [PingResult(*each) for each in heard]
        survey.views[node] = RunDirView(*view)
    return "no" if survey.unreachable else "yes"


def _measure(survey: HostSurvey, config: Config, environment: ClusterEnvironment, store: Any) -> None:
    """Opens the groups that a run would open, and measures their links."""
    stuck = f"rank {environment.rank}: the ranks' own connections are not made, or nothing passes, in {LINK_TIMEOUT_SECONDS} s"
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
