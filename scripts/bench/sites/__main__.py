"""Measure links between sites and a coordinator, on this machine, and print Markdown tables.

    python -m scripts.bench.sites --all

link         the share of a shaped link that messages use over mutual TLS, up and down; two hosts are network
             namespaces, which needs root
combination  two sites combine 100M parameters on loopback, beside a bare gloo all_reduce by two ranks, in turn; and
             the memory of the coordinator, of a site, and of a rank that trains the same in one world
many         a coordinator with 4 to 64 sites that push noise of 1M parameters, and a forecast for 512

Every member is a process of one thread, with certificates of a throwaway authority.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.bench.paired_timing import machine
from scripts.bench.sites.combination import Combination, Memory, measure_combination
from scripts.bench.sites.link import CASES, Case, Use, measure_links
from scripts.bench.sites.many import COUNTS, Crowd, Forecast, Growth, forecast, growth, measure_crowds
from scripts.bench.sites.processes import FLOAT_BYTES
from scripts.network_namespaces import why_not

FORECAST_SITES = 512
FORECAST_RATES = (1e9, 10e9)
FORECAST_CORES = (2, 16)
MEGA, GIGA = 1e6, 1e9

QUICK_CASES = [Case("100mbit", 1e8, 1_000_000, 0.93)]


def link_table(uses: Sequence[Use]) -> list[str]:
    """Return the rows of `link`."""
    rows = [
        "| rate | direction | MB/s of tensors, of the link | goal | headers | link idle | "
        "ms | processor of both ends, ms | of Python's threads, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for use in uses:
        shares = f"{use.goodput:.3f} | {use.goal} | {use.framing:.3f} | {use.idle:.3f}"
        times = f"{1e3 * use.seconds:.0f} | {1e3 * use.processor:.0f} | {1e3 * use.python:.0f}"
        rows.append(f"| {use.rate} | {use.direction} | {shares} | {times} |")
    return rows


def combination_table(found: Combination) -> list[str]:
    """Return the row of `combination`."""
    low, high = found.spread
    return [
        "| parameters | sites | bare all_reduce | ratio, median | middle half | goal | processor of the coordinator | "
        "of both sites | of both ranks |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| {found.numbers:,} | {1e3 * found.ours:.0f} ms | {1e3 * found.bare:.0f} ms | {found.ratio:.2f} | "
        f"{low:.2f} to {high:.2f} | {found.goal:.0f} | {found.coordinator:.2f} s | {found.sites:.2f} s | "
        f"{found.ranks:.2f} s |",
    ]


def memory_table(memories: Sequence[Memory]) -> list[str]:
    """Return the rows of the memory of `combination`."""
    rows = [
        "| in models | anonymous | goal | mapped files | control group | its page cache |",
        "|---|---|---|---|---|---|",
    ]
    for each in memories:
        values = (each.anonymous, each.goal, each.mapped, each.group, each.cache)
        rows.append(f"| {each.process} | {' | '.join('-' if value is None else f'{value:.2f}' for value in values)} |")
    return rows


def crowd_table(crowds: Sequence[Crowd]) -> list[str]:
    """Return the rows of `many`."""
    rows = [
        "| sites | versions a minute | processor of the coordinator, s a version | a site, ms | "
        "of all sites, s | memory, MB | page cache, MB | threads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for crowd in crowds:
        processor = f"{crowd.processor:.3f} | {1e3 * crowd.processor / crowd.sites:.1f} | {crowd.sites_processor:.3f}"
        memory = f"{crowd.anonymous / MEGA:.0f} | {crowd.cache / MEGA:.0f}"
        rows.append(f"| {crowd.sites} | {crowd.versions:.1f} | {processor} | {memory} | {crowd.threads} |")
    return rows


def forecast_table(line: Growth, forecasts: Sequence[Forecast]) -> list[str]:
    """Return the growth of `many`, and the rows of its forecast."""
    rows = [
        f"A version takes {1e3 * line.fixed:.0f} ms of the coordinator's processor, and {1e3 * line.per_site:.1f} ms "
        f"for each site; the largest number of sites takes {line.bend:.2f} times what this line says. A site takes "
        f"{line.bytes_per_site / MEGA:.1f} MB of memory.",
        "",
        "| sites, on paper | link, Gbit/s | cores | seconds of the link a version | of the processor | memory, GB | "
        "threads |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in forecasts:
        seconds = f"{each.link:.1f} | {each.processor:.1f}"
        machine = f"{each.rate / GIGA:.0f} | {each.cores}"
        rows.append(f"| {each.sites} | {machine} | {seconds} | {each.memory / GIGA:.1f} | {each.threads} |")
    return rows


def run_link(choices: argparse.Namespace, folder: str) -> tuple[list[str], Any]:
    if reason := why_not():
        return [f"Hosts cannot be made here: {reason}"], []
    uses = measure_links(QUICK_CASES if choices.quick else CASES, 1 if choices.quick else choices.repeats, folder)
    return link_table(uses), list(map(asdict, uses))


def run_combination(choices: argparse.Namespace, folder: str) -> tuple[list[str], Any]:
    numbers, pairs = (1_000_000, 1) if choices.quick else (choices.numbers, choices.repeats)
    found, memories = measure_combination(numbers, pairs, folder)
    rows = [*combination_table(found), "", *memory_table(memories)]
    return rows, {"combination": asdict(found), "memory": list(map(asdict, memories))}


def run_many(choices: argparse.Namespace, folder: str) -> tuple[list[str], Any]:
    counts = (1, 2, 3) if choices.quick else COUNTS
    numbers = 1_000_000
    crowds = measure_crowds(counts, numbers, folder)
    line = growth(crowds)
    size, copies = numbers * FLOAT_BYTES, 3.0
    forecasts = [
        forecast(line, FORECAST_SITES, size, rate, cores, copies) for rate in FORECAST_RATES for cores in FORECAST_CORES
    ]
    rows = [*crowd_table(crowds), "", *forecast_table(line, forecasts)]
    return rows, {
        "crowds": list(map(asdict, crowds)),
        "growth": asdict(line),
        "forecasts": list(map(asdict, forecasts)),
    }


CASES_BY_NAME: dict[str, Callable[[argparse.Namespace, str], tuple[list[str], Any]]] = {
    "link": run_link,
    "combination": run_combination,
    "many": run_many,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES_BY_NAME)}")
    parser.add_argument("--all", action="store_true", help="all cases: at most ten minutes")
    parser.add_argument("--quick", action="store_true", help="small messages once: whether it works, no figures")
    parser.add_argument("--repeats", type=int, default=7, help="of each transfer and each pair")
    parser.add_argument("--numbers", type=int, default=100_000_000, help="parameters of the combination")
    parser.add_argument("--folder", type=Path, help="where the coordinator's files go, such as /dev/shm")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there, too")
    choices = parser.parse_args(arguments)
    names = list(CASES_BY_NAME) if choices.all else choices.cases
    if unknown := [name for name in names if name not in CASES_BY_NAME]:
        parser.error(f"unknown: {', '.join(unknown)}; valid: {', '.join(CASES_BY_NAME)}")
    if not names:
        parser.error(f"name cases of {', '.join(CASES_BY_NAME)}, or say --all")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # no process, group or file is left
    figures = {"machine": machine(), "load": os.getloadavg()[0]}
    print(f"{figures['machine']}; load {figures['load']:.1f} at the start", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory(dir=choices.folder) as folder:
            rows, figures[name] = CASES_BY_NAME[name](choices, folder)
        print("", *rows, sep="\n", flush=True)
    if choices.json:
        choices.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
