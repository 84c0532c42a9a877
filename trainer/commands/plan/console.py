"""The plan on the console, in 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta

from rich.console import Console
from rich.table import Column
from rich.text import Text

from trainer.commands.plan.cost_model import CostModel, estimate
from trainer.commands.plan.measure import RunPlan
from trainer.utils.tables import make_table
from trainer.utils.text import format_bytes, format_seconds

LABEL_WIDTH, FIRST_WIDTH = 9, 40
WHOLE_ROUND = "the whole round"

Row = tuple[str, str, str]  # quantity, value, share of the whole


def show(plan: RunPlan, console: Console) -> None:
    """Print the plan."""
    for label, text in _facts(plan):
        console.print(Text.assemble((label.ljust(LABEL_WIDTH), "bold"), text), soft_wrap=True)
    _show_table("a round", _seconds(plan.costs), console)
    _show_table("sent in a round", _sizes(_traffic(plan.costs)), console)
    _show_table("memory of a rank", _sizes({**plan.memory, "all": sum(plan.memory.values())}), console)


def _show_table(heading: str, rows: Sequence[Row], console: Console) -> None:
    if rows:
        columns = Column(heading, min_width=FIRST_WIDTH), Column("", justify="right"), Column("", justify="right")
        console.print()
        console.print(make_table(columns, rows))


def _sizes(sizes: Mapping[str, float]) -> list[Row]:
    return [(name, format_bytes(size), "") for name, size in sizes.items() if size]


def _facts(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Yield lines on the world, the model, steps, rounds and run, and the links."""
    run, costs = plan.run, plan.costs
    sizes = costs.silo_sizes
    silos = f"{len(sizes)} silo{'s' * (len(sizes) != 1)} of {_range(sizes)} replica{'s' * (max(sizes) != 1)}"
    yield "world", f"{sum(sizes)} ranks on {run.topology.device.type}: {silos}; threads of each: {plan.threads}"
    yield "model", plan.model
    yield "a step", _step(plan)
    steps, examples = _range(load.steps for load in costs.loads), _range(load.examples for load in costs.loads)
    yield "a round", f"{steps} steps and {examples} examples of a silo"
    steps = _range(load.steps * costs.rounds for load in costs.loads)
    seconds = timedelta(seconds=math.ceil(estimate(costs).seconds * costs.rounds))
    yield "the run", f"{costs.rounds:,} rounds, {steps} steps of a silo, {seconds} without evaluation"
    links = {"inside": (costs.intra_silo, "a small all-reduce"), "between": (costs.inter_silo, "a small all-reduce")}
    if costs.star:
        links["between"] = (costs.star.link, "a small message and its answer")
    for label, (link, message) in links.items():
        if link:
            speed = f"{format_bytes(link.bandwidth)}/s, {format_seconds(link.latency)} for {message}"
            yield label, f"{speed}, {'measured' if link.is_measured else 'as given'}"


def _step(plan: RunPlan) -> str:
    batch_size, micro_batch_size = plan.run.training.batch_size, plan.run.training.micro_batch_size
    if batch_size == "all":
        return "all examples of a client"
    per_rank = [-(-batch_size // load.replicas) for load in plan.costs.loads]
    micro_batches = [-(-size // micro_batch_size) if isinstance(micro_batch_size, int) else 1 for size in per_rank]
    accumulation = f", in {_range(micro_batches)} micro-batches" if max(micro_batches) > 1 else ""
    return f"{batch_size} examples of a silo, {_range(per_rank)} of a rank{accumulation}"


def _seconds(costs: CostModel) -> list[Row]:
    """Return the seconds of a round and of its parts, with their shares."""
    round = estimate(costs)
    sending = "meeting at the coordinator" if costs.star else "sending between silos"
    parts = {
        "computing: the steps": round.computing,
        "averaging gradients inside silos": round.averaging,
        "updating parameters: clients and server": round.updating,
        f"{sending}, then inside": round.sending,
        WHOLE_ROUND: round.seconds,
    }
    return [(name, f"{took:,.4f} s", f"{took / round.seconds:.1%}") for name, took in parts.items() if took]


def _traffic(costs: CostModel) -> dict[str, float]:
    """Return the bytes that are sent in a round, and between the silos in the run."""
    inside, all_silos = {"inside silos, by a rank": costs.intra_silo_bytes}, costs.traffic.inter_silo
    if star := costs.star:
        of_coordinator = star.sites * (star.brought + star.fetched)
        return {
            **inside,
            "by a site, to the coordinator": star.brought,
            "by the coordinator, to a site": star.fetched,
            f"by the coordinator and {star.sites} sites": of_coordinator,
            "by all of them in the run": of_coordinator * costs.rounds,
        }
    return {
        **inside,
        "between silos, by a silo": all_silos / len(costs.loads),
        "between silos, by all": all_silos,
        "between silos, by all in the run": all_silos * costs.rounds,
    }


def _range(values: Iterable[int]) -> str:
    """Format the smallest and the largest of these numbers."""
    values = list(values)
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
