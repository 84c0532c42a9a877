"""A coordinator with many sites, which do nothing but push noise: versions a minute, processor and memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from scripts.bench.sites.processes import options_of, start_all, watching
from trainer.federation.server import MAX_STREAMS, SPARE_THREADS

COUNTS = (4, 8, 16, 32, 64)
SITE_PROCESSES = 2  # which the sites share as threads
ROUNDS_OF_ALL = 160  # of all sites together
FEWEST_ROUNDS = 4
PYTHON_SHARE = 0.3  # of the processor time of a transfer, by `link`
BITS = 8


@dataclass(frozen=True)
class Crowd:
    """The needs of a coordinator with a number of sites.

    Attributes:
        sites: their number.
        versions: of the global model, a minute.
        seconds: from one version to the next.
        processor: seconds of the coordinator's processor for a version.
        sites_processor: likewise, of all sites together.
        anonymous: the largest memory of the coordinator, in bytes, above what it had without sites.
        cache: page cache of its spool at that time, in bytes; 0 without a control group.
        threads: of the coordinator.
    """

    sites: int
    versions: float
    seconds: float
    processor: float
    sites_processor: float
    anonymous: int
    cache: int
    threads: int


@dataclass(frozen=True)
class Growth:
    """A straight line through what a coordinator needs by the number of sites, and how far the largest is off it.

    Attributes:
        fixed: seconds of processor of a version that do not depend on the number of sites.
        per_site: seconds of processor of a version, for each site.
        bytes_per_site: of memory.
        bend: the processor time of the most sites over that of the line through the others: at most 1 is linear.
    """

    fixed: float
    per_site: float
    bytes_per_site: float
    bend: float


def measure_crowds(counts: Sequence[int], numbers: int, folder: str) -> list[Crowd]:
    """Measure a model of about this many parameters with each number of sites."""
    return [_measure(count, numbers, folder) for count in counts]


def _measure(count: int, numbers: int, folder: str) -> Crowd:
    names = [f"site-{number}" for number in range(count)]
    options = options_of(folder, names) | {"numbers": numbers}
    shares = [names[start::SITE_PROCESSES] for start in range(min(SITE_PROCESSES, count))]
    rounds = max(ROUNDS_OF_ALL // count, FEWEST_ROUNDS)
    with ExitStack() as stack:
        roles = [("coordinator", options), *(("noise", {**options, "names": share}) for share in shares)]
        coordinator, *sites = processes = stack.enter_context(start_all(roles))
        stack.enter_context(watching([coordinator]))

        def run(rounds: int) -> float:
            began = perf_counter()
            for process in sites:
                process.tell(f"run {rounds}")
            for process in sites:
                process.answer()
            return perf_counter() - began

        run(1)
        before = [process.processor_seconds() for process in processes]
        seconds = run(rounds) / rounds
        after = [process.processor_seconds() for process in processes]
        own, *others = ((now - then) / rounds for now, then in zip(after, before, strict=True))
        return Crowd(
            sites=count,
            versions=60 / seconds,
            seconds=seconds,
            processor=own,
            sites_processor=sum(others),
            anonymous=coordinator.peaks.anonymous - coordinator.base.anonymous,
            cache=coordinator.peaks.cache,
            threads=coordinator.threads(),
        )


def growth(crowds: Sequence[Crowd]) -> Growth:
    """Fit lines through all numbers of sites but the largest, which is compared with them."""
    *others, largest = crowds
    sites = [crowd.sites for crowd in others]
    per_site, fixed = np.polyfit(sites, [crowd.processor for crowd in others], 1)
    held = np.polyfit([crowd.sites for crowd in crowds], [crowd.anonymous for crowd in crowds], 1)[0]
    return Growth(float(fixed), float(per_site), float(held), largest.processor / (fixed + per_site * largest.sites))


@dataclass(frozen=True)
class Forecast:
    """A coordinator on paper.

    Attributes:
        sites: their number.
        rate: of the coordinator's link, in bits a second and direction.
        cores: of the coordinator.
        link: seconds that the link needs for a version, in the direction that needs more.
        processor: seconds that the cores need for it.
        memory: bytes of the coordinator.
        threads: that its streams may need.
    """

    sites: int
    rate: float
    cores: int
    link: float
    processor: float
    memory: float
    threads: int


def forecast(line: Growth, sites: int, size: int, rate: float, cores: int, copies: float) -> Forecast:
    """Reckon a coordinator from what was measured.

    Args:
        line: of the measured coordinators.
        sites: their number.
        size: of the model in bytes, which each site sends and gets once a version.
        rate: of the link.
        cores: of the coordinator. They share the work but for that of Python's threads, of which one runs at a time.
        copies: of the model that the coordinator holds.
    """
    return Forecast(
        sites=sites,
        rate=rate,
        cores=cores,
        link=sites * size * BITS / rate,
        processor=line.fixed + line.per_site * sites * max(1 / cores, PYTHON_SHARE),
        memory=copies * size + line.bytes_per_site * sites,
        threads=SPARE_THREADS + MAX_STREAMS * sites,
    )
