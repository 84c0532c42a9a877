"""The plan on the console, in 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.commands.plan.advice import advice
from trainer.commands.plan.cost_model import CostModel, LinkSpeed
from trainer.commands.plan.estimate import LENGTHS, Estimate, estimate
from trainer.commands.plan.measure import RunPlan
from trainer.commands.plan.traffic import SentBytes, all_gather_traffic, gradient_traffic, inter_silo_traffic

LABEL_WIDTH, FIRST_WIDTH = 9, 44
WHOLE_ROUND = "the whole round"
UNITS = ("B", "kB", "MB", "GB", "TB")


def show(plan: RunPlan, console: Console) -> None:
    """Prints the plan."""
    for label, said in _facts(plan):
        console.print(Text.assemble((label.ljust(LABEL_WIDTH), "bold"), said), soft_wrap=True)
    tables = {
        ("bytes sent", "by a rank", "by a silo", "by all"): _bytes(plan.costs),
        ("memory of a rank", "bytes"): _memory(plan),
        ("seconds of a round", "", ""): _parts(estimate(plan.costs)),
        ("steps of a round", "seconds", "utilisation", *_others(plan.costs)): _lengths(plan.costs),
    }
    for headings, rows in tables.items():
        if rows:
            console.print()
            console.print(_table(headings, rows))
    console.print()
    for said in advice(plan.costs):
        console.print(Text(said))


def size(value: float) -> str:
    """Bytes to read, in the prefixes of SI.

    >>> [size(value) for value in (0, 999, 172_288, 3.5e9)]
    ['0 B', '999 B', '172.3 kB', '3.5 GB']
    """
    power = min(int(math.log10(value)) // 3, len(UNITS) - 1) if value >= 1 else 0
    return f"{value / 1000**power:.4g} {UNITS[power]}"


def _facts(plan: RunPlan) -> Iterable[tuple[str, str]]:
    run, costs = plan.run, plan.costs
    sizes = costs.silo_sizes
    yield "mesh", f"{sum(sizes)} ranks on {run.topology.device.type}: {_silos(sizes)}; threads each: {plan.threads}"
    parameters = sum(parameter.numel() for parameter in run.module.parameters())
    yield "model", f"{type(run.module).__name__}, {parameters:,} parameters"
    yield "a step", _step(plan)
    steps, examples = _range(load.steps for load in costs.loads), _range(load.examples for load in costs.loads)
    a_rank = _range(load.examples // load.replicas for load in costs.loads)
    yield "a round", f"{steps} steps of a silo, {examples} examples; {a_rank} of a rank"
    all_steps = _range(load.steps * costs.rounds for load in costs.loads)
    seconds = timedelta(seconds=math.ceil(estimate(costs).seconds * costs.rounds))
    yield "the run", f"{costs.rounds:,} rounds, {all_steps} steps of a silo, {seconds} without evaluation"
    for name, line in {"inside": costs.intra_silo, "between": costs.inter_silo}.items():
        if line:
            yield name, _line(line)


def _silos(sizes: Sequence[int]) -> str:
    if len(sizes) == 1:
        return f"1 silo of {sizes[0]} replica{'s' * (sizes[0] != 1)}"
    return f"{len(sizes)} silos of {_range(sizes)} replica{'s' * (max(sizes) != 1)}"


def _step(plan: RunPlan) -> str:
    run = plan.run
    whole = run.batch_size
    if whole is None:
        return "all examples of a client"
    shares = [-(-whole // load.replicas) for load in plan.costs.loads]
    size = run.micro_batch_size
    pieces = [-(-share // size) if isinstance(size, int) else 1 for share in shares]
    cut = f", in {_range(pieces)} micro-batches" if max(pieces) > 1 else ""
    return f"{whole} examples of a silo, {_range(shares)} of a rank{cut}"


def _line(line: LinkSpeed) -> str:
    how = "measured" if line.is_measured else "as told"
    return f"{size(line.bandwidth)}/s, {line.latency * 1e3:,.1f} ms a sum, {how}"


def _bytes(costs: CostModel) -> list[Sequence[str]]:
    rows: dict[str, SentBytes] = {}
    if costs.intra_silo:
        rows["inside silos, a step"] = gradient_traffic(costs)
        rows["inside silos, end of a round"] = all_gather_traffic(costs)
    if costs.inter_silo:
        rows["between silos, a round"] = inter_silo_traffic(costs)
        rows["between silos, the run"] = inter_silo_traffic(costs).scaled(costs.rounds)
    return [(name, *map(size, (sent.rank, sent.silo, sent.all))) for name, sent in rows.items() if sent.all]


def _memory(plan: RunPlan) -> list[Sequence[str]]:
    rows = [(name, size(held)) for name, held in plan.memory.items()]
    return [*rows, ("all", size(sum(plan.memory.values())))]


def _parts(now: Estimate) -> list[Sequence[str]]:
    parts = {
        "computing: the steps": now.computing,
        "averaging gradients inside silos": now.averaging,
        "passing over memory: clients, deltas, server": now.passing,
        "sending between silos, and then inside": now.sending,
    }
    rows = [(name, _seconds(took), f"{took / now.seconds:.1%}") for name, took in parts.items() if took]
    return [*rows, (WHOLE_ROUND, _seconds(now.seconds), "100.0%")]


def _lengths(costs: CostModel) -> list[Sequence[str]]:
    """Rounds of several lengths; one, if a round ends without a combination."""
    lengths = LENGTHS if costs.traffic.inter_silo else (1.0,)
    forecasts = {estimate(costs, length).steps: length for length in lengths}
    return [(f"{steps:,}", *_of_length(costs, length)) for steps, length in sorted(forecasts.items())]


def _of_length(costs: CostModel, length: float) -> Iterable[str]:
    """Seconds and utilisation, and the utilisation with each other uplink."""
    now = estimate(costs, length)
    others = [estimate(costs.with_uplink(name), length) for name in _others(costs)]
    return _seconds(now.seconds), *(f"{each.utilisation:.2f}" for each in (now, *others))


def _others(costs: CostModel) -> list[str]:
    """The uplinks that the run could have too."""
    return [name for name in costs.compression_costs if name != costs.uplink] if costs.inter_silo else []


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    width = FIRST_WIDTH if len(headings) < 5 else 0
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if place else "left", min_width=0 if place else width)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _seconds(value: float) -> str:
    return f"{value:,.4f}"


def _range(values: Iterable[int]) -> str:
    """The least and the most of these numbers."""
    values = list(values)
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
