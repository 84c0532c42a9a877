"""The survey on the console: ranks that are alike in one row, links, diagnoses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from trainer.commands.doctor.checks import Diagnosis, enumerate_few
from trainer.commands.doctor.examine import HostSurvey
from trainer.commands.probe.host_facts import HostFacts
from trainer.commands.probe.link_bandwidth import Link
from trainer.utils.tables import make_table
from trainer.utils.text import format_bytes, format_seconds

RANK_HEADINGS = ("ranks", "hosts", "interface", "threads", "cores", "GiB: memory", "shm", "disk", "GPU")
FEDERATION_HEADINGS = ("federation", "")
LINK_HEADINGS = ("links", "groups of ranks", "latency", "bandwidth", "slowest at")


def show(
    survey: HostSurvey, federation: Sequence[tuple[str, str]], diagnoses: Sequence[Diagnosis], console: Console
) -> None:
    """Print the survey, what was found of the federation, and the diagnoses."""
    versions = survey.facts[0].versions
    console.print(Text(", ".join(f"{name} {version}" for name, version in versions.items())), soft_wrap=True)
    console.print(make_table(RANK_HEADINGS, [_rank_row(group) for group in groups(survey.facts)]))
    offsets = [abs(result.clock_offset) for result in survey.pings.get(0, []) if not result.error]
    if offsets:
        console.print(f"clocks: at most {format_seconds(max(offsets))} off that of rank 0")
    if survey.links:
        console.print(make_table(LINK_HEADINGS, [_link_row(link, survey.facts) for link in survey.links]))
    elif survey.unreachable:
        console.print("links: not measured, because hosts do not reach each other")
    if federation:
        console.print(make_table(FEDERATION_HEADINGS, federation))
    for diagnosis in diagnoses:
        style, word = ("bold red", "wrong") if diagnosis.is_error else ("yellow", "note ")
        console.print(Text.assemble((word, style), "  ", diagnosis.text), soft_wrap=True)
        console.print(Text(f"         {diagnosis.remedy}"), soft_wrap=True)
    if not any(diagnosis.is_error for diagnosis in diagnoses):
        console.print("nothing would go wrong")


def groups(facts: Iterable[HostFacts]) -> list[list[HostFacts]]:
    """Group ranks that differ only in host, address and free space."""
    found: dict[object, list[HostFacts]] = {}
    for rank in facts:
        versions = tuple(rank.versions.items())
        key = rank.interface, rank.threads, len(rank.cores), rank.gpu.partition(" GPU-")[0], versions
        found.setdefault(key, []).append(rank)
    return list(found.values())


def ranges(ranks: Sequence[int]) -> str:
    """Format ascending numbers, consecutive ones as a range.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return enumerate_few("-".join(map(str, run)) for run in runs)


def _rank_row(group: Sequence[HostFacts]) -> list[str]:
    first = group[0]
    models = (rank.gpu.rpartition(" ")[0] for rank in group)
    gpu = f"{enumerate_few(models)}, {_least(rank.gpu_memory for rank in group)} GiB" if first.gpu else "none"
    return [
        ranges([rank.rank for rank in group]),
        enumerate_few(rank.host for rank in group),
        f"{first.interface} {enumerate_few(rank.address for rank in group)}",
        str(first.threads),
        str(len(first.cores)),
        *(_least(getattr(rank, name) for rank in group) for name in ("memory", "shm", "disk")),
        gpu,
    ]


def _least(sizes: Iterable[float]) -> str:
    return f"{min(sizes):.1f}"


def _link_row(link: Link, facts: Sequence[HostFacts]) -> list[str]:
    ranks, slowest = f"{link.groups} of {link.largest}", facts[link.slowest]
    speed = format_seconds(link.latency), f"{format_bytes(link.bandwidth)}/s"
    return [link.name, ranks, *speed, f"rank {slowest.rank}, {slowest.host}"]
