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

from trainer.commands.doctor.run_dir_check import View, look, marked
from trainer.commands.probe.connectivity import Heard, ask_all, listen
from trainer.commands.probe.host_facts import Facts, find_facts
from trainer.commands.probe.link_bandwidth import Link, measure_links
from trainer.commands.probe.network_interfaces import of_gloo
from trainer.commands.probe.watchdog import deadline
from trainer.config.schema import Config
from trainer.distributed.environment import Place
from trainer.distributed.topology import distributed, share

SECONDS_TO_ANSWER = 60  # for all ranks to say what they find
SECONDS_FOR_LINKS = 120
SECONDS_TO_COLLECT = 30  # for one collective


@dataclass
class Examination:
    """What was found, on rank 0. heard and views: by node. links: None when they were not measured, and why not."""

    facts: list[Facts] = field(default_factory=list)
    heard: dict[int, list[Heard]] = field(default_factory=dict)
    views: dict[int, View] = field(default_factory=dict)
    links: list[Link] | None = None
    links_fault: str = ""

    @property
    def first_ranks(self) -> list[Facts]:
        """The facts of the first rank of each node, which speaks for it."""
        return [facts for facts in self.facts if facts.port]

    @property
    def unreached(self) -> list[tuple[Facts, Facts, str]]:
        """Nodes that have not reached others: from, to, why."""
        nodes = {facts.node: facts for facts in self.first_ranks}
        return [
            (nodes[node], nodes[heard.node], heard.fault)
            for node, all_heard in self.heard.items()
            for heard in all_heard
            if heard.fault
        ]


def examine(config: Config, place: Place, store: Any) -> Examination:
    """What all ranks found; complete on rank 0 alone. Every rank calls it. Raises ValueError, on all, for bad input."""
    exam, stack = Examination(), ExitStack()
    with stack, deadline(SECONDS_TO_ANSWER, f"rank {place.rank}: the ranks have not answered in {SECONDS_TO_ANSWER} s"):
        store.set(f"facts/{place.rank}", _own_facts(config, place))
        plan = json.loads(share(store, "plan", place, lambda: json.dumps(_plan(exam, config, place, store, stack))))
        if "faults" in plan:
            raise ValueError(plan["faults"])
        if place.local_rank == 0:
            others = {int(node): where for node, where in plan["nodes"].items() if int(node) != place.node}
            view = look(Path(str(config.run_dir)), plan["mark"])
            store.set(f"view/{place.node}", json.dumps([ask_all(others), view]))
        fit = share(store, "fit", place, lambda: _put_together(exam, plan["nodes"], store))
    if fit == "yes":
        _measure(exam, config, place, store)
    return exam


def _own_facts(config: Config, place: Place) -> str:
    try:
        port = listen(of_gloo().address, place.node) if place.local_rank == 0 else 0
        return json.dumps(asdict(find_facts(config, place, port)))
    except ValueError as error:
        return json.dumps({"fault": str(error)})


def _plan(exam: Examination, config: Config, place: Place, store: Any, stack: ExitStack) -> dict[str, Any]:
    """Rank 0 hears all, and says where each node listens and which file lies beside the run folder."""
    told = [json.loads(store.get(f"facts/{rank}")) for rank in range(place.world_size)]
    if faults := dict.fromkeys(facts["fault"] for facts in told if "fault" in facts):
        return {"faults": "\n".join(faults)}
    exam.facts = [Facts(**facts) for facts in told]
    mark = stack.enter_context(marked(Path(str(config.run_dir))))
    return {"nodes": {facts.node: (facts.address, facts.port) for facts in exam.first_ranks}, "mark": mark}


def _put_together(exam: Examination, nodes: dict[str, Any], store: Any) -> str:
    """Whether the ranks can make connections of their own, when rank 0 has heard what the nodes have seen."""
    for node in map(int, nodes):
        heard, view = json.loads(store.get(f"view/{node}"))
        exam.heard[node] = [Heard(*each) for each in heard]
        exam.views[node] = View(*view)
    return "no" if exam.unreached else "yes"


def _measure(exam: Examination, config: Config, place: Place, store: Any) -> None:
    """Opens the groups that a run would open, and measures their links."""
    stuck = f"rank {place.rank}: the ranks' own connections are not made, or nothing passes, in {SECONDS_FOR_LINKS} s"
    launch = config.launch
    limits = (SECONDS_TO_COLLECT, SECONDS_TO_COLLECT, launch.inter_silo_backend)
    try:
        with (
            deadline(SECONDS_FOR_LINKS, stuck),
            distributed(config.silos, place, store, launch.device, *limits, backend=launch.backend) as silos,
            distributed("node", place, device=launch.device, backend=launch.backend) as hosts,
        ):
            exam.links = measure_links(silos, hosts)
    except RuntimeError as error:
        exam.links_fault = str(error).splitlines()[0]
