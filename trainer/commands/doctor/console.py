"""The examination on the console: ranks that are alike in one row, links, findings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.commands.doctor.checks import Diagnosis, first_few
from trainer.commands.doctor.examine import HostSurvey
from trainer.commands.probe.host_facts import HostFacts
from trainer.commands.probe.link_bandwidth import Link

HEADINGS = ("ranks", "hosts", "interface", "threads", "cores", "GiB: memory", "shm", "disk", "GPU")


def show(survey: HostSurvey, found: Sequence[Diagnosis], console: Console) -> None:
    """Prints what was found."""
    first = survey.facts[0]
    console.print(Text(", ".join(f"{name} {version}" for name, version in first.versions.items())), soft_wrap=True)
    console.print(_table(HEADINGS, [_row(alike) for alike in groups(survey.facts)]))
    clocks = [abs(heard.clock_offset) for heard in survey.pings.get(0, []) if not heard.error]
    if clocks:
        console.print(f"clocks: at most {max(clocks) * 1000:.1f} ms off that of rank 0")
    if survey.links:
        heads = ("links", "groups of ranks", "latency", "bandwidth", "slowest at")
        console.print(_table(heads, [_link(link, survey.facts) for link in survey.links]))
    elif survey.unreachable:
        console.print("links: not measured, because hosts do not reach each other")
    for finding in found:
        style, word = ("bold red", "wrong") if finding.is_error else ("yellow", "note ")
        console.print(Text.assemble((word, style), "  ", finding.text), soft_wrap=True)
        console.print(Text(f"         {finding.remedy}"), soft_wrap=True)
    if not any(finding.is_error for finding in found):
        console.print("nothing was found that would go wrong")


def groups(facts: Iterable[HostFacts]) -> list[list[HostFacts]]:
    """Ranks that are alike but for their host, its address and free room."""
    alike: dict[object, list[HostFacts]] = {}
    for each in facts:
        versions = tuple(each.versions.items())
        key = each.interface, each.threads, len(each.cores), each.gpu.partition(" GPU-")[0], versions
        alike.setdefault(key, []).append(each)
    return list(alike.values())


def ranges(ranks: Sequence[int]) -> str:
    """Ascending numbers, those in a row by the first and the last.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return first_few("-".join(map(str, run)) for run in runs)


def _row(alike: Sequence[HostFacts]) -> list[str]:
    first = alike[0]
    models = {each.gpu.rpartition(" ")[0] for each in alike}
    gpu = f"{first_few(models)}, {_least(each.gpu_memory for each in alike)} GiB" if first.gpu else "none"
    return [
        ranges([each.rank for each in alike]),
        first_few(each.host for each in alike),
        f"{first.interface} {first_few(each.address for each in alike)}",
        str(first.threads),
        str(len(first.cores)),
        *(_least(getattr(each, name) for each in alike) for name in ("memory", "shm", "disk")),
        gpu,
    ]


def _least(sizes: Iterable[float]) -> str:
    return f"{min(sizes):.1f}"


def _link(link: Link, facts: Sequence[HostFacts]) -> list[str]:
    latency = f"{link.latency * 1e6:.0f} us"
    slowest = facts[link.slowest]
    where = f"rank {slowest.rank}, {slowest.host}"
    return [link.name, f"{link.groups} of {link.largest}", latency, f"{link.bandwidth / 1e9:.2f} GB/s", where]


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*headings, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
