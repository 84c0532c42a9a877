"""A combination over sites beside a bare all_reduce of the same vector, and the memory of all that take part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

from scripts.bench.sites.processes import FLOAT_BYTES, Peaks, Process, free_port, options_of, start_all, watching

SITES = ["a", "b"]
GOAL = 6.0  # times the bare all_reduce
COPIES = 3.0  # of the model in the coordinator's memory, besides the spool
WARM_UP = 2  # rounds


@dataclass(frozen=True)
class Combination:
    """Medians over the pairs.

    Attributes:
        numbers: parameters of the model.
        pairs: of a combination and an all_reduce.
        ours: seconds of a combination, from the last step of a round to the first of the next.
        bare: seconds of the all_reduce.
        ratio: of both.
        spread: the middle half of the ratios.
        coordinator: seconds of its processor for a combination.
        sites: likewise, of both sites together.
        ranks: seconds of processor of both ranks for an all_reduce.
        goal: of the ratio.
    """

    numbers: int
    pairs: int
    ours: float
    bare: float
    ratio: float
    spread: tuple[float, float]
    coordinator: float
    sites: float
    ranks: float
    goal: float = GOAL


@dataclass(frozen=True)
class Memory:
    """The largest memory of a process, above what it had before there was a model, in models.

    Attributes:
        process: which one.
        anonymous: written by itself: tensors and messages.
        mapped: files that it has mapped: the spool, while it is read.
        group: of its control group; None without one.
        cache: the part of it that is page cache, which the kernel may drop once it is on the disk; None likewise.
        goal: of `anonymous`; None: it has none.
    """

    process: str
    anonymous: float
    mapped: float
    group: float | None
    cache: float | None
    goal: float | None


def measure_combination(numbers: int, pairs: int, folder: str) -> tuple[Combination, list[Memory]]:
    """Measure a model of about this many parameters; both sides in turn."""
    options: dict[str, Any] = options_of(folder, SITES) | {"numbers": numbers}
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    roles: list[tuple[str, dict[str, Any]]] = [
        ("coordinator", options),
        *(("site", {**options, "name": name}) for name in SITES),
        *(("rank", {**options, "environment": world | {"RANK": str(n), "LOCAL_RANK": str(n)}}) for n in range(2)),
    ]
    with start_all(roles) as processes, watching(processes):
        coordinator, sites, ranks = processes[0], processes[1:3], processes[3:]
        (size,) = {process.answer()["bytes"] for process in (*sites, *ranks)}
        for _ in range(WARM_UP):
            for members in (ranks, sites):
                _together(members, "train")
                _together(members, "combine")
        alone = replace(ranks[0].peaks)  # before there is another vector
        times: list[tuple[float, float]] = []
        spent: list[tuple[float, float, float]] = []
        for _ in range(pairs):
            _together(sites, "train")
            began = _processor([coordinator]), _processor(sites), _processor(ranks)
            times.append((_together(sites, "combine"), _together(ranks, "all_reduce")))
            ended = _processor([coordinator]), _processor(sites), _processor(ranks)
            spent.append((ended[0] - began[0], ended[1] - began[1], ended[2] - began[2]))
        memory = [
            _memory("coordinator", coordinator.peaks, coordinator.base, size, COPIES),
            _memory("site", sites[0].peaks, sites[0].base, size, None),
            _memory("rank of one world", alone, ranks[0].base, size, None),
        ]
    memory[1] = replace(memory[1], goal=memory[2].anonymous + 1)
    ratios = sorted(ours / bare for ours, bare in times)
    return (
        Combination(
            numbers=size // FLOAT_BYTES,
            pairs=pairs,
            ours=median(ours for ours, _ in times),
            bare=median(bare for _, bare in times),
            ratio=median(ratios),
            spread=(ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]),
            coordinator=median(each[0] for each in spent),
            sites=median(each[1] for each in spent),
            ranks=median(each[2] for each in spent),
        ),
        memory,
    )


def _together(processes: Sequence[Process], command: str) -> float:
    """Return the seconds until all have done as they are asked."""
    began = perf_counter()
    for process in processes:
        process.tell(command)
    for process in processes:
        process.answer()
    return perf_counter() - began


def _processor(processes: Sequence[Process]) -> float:
    return sum(process.processor_seconds() for process in processes)


def _memory(name: str, peaks: Peaks, base: Peaks, size: int, goal: float | None) -> Memory:
    has_group = peaks.group > 0
    return Memory(
        process=name,
        anonymous=(peaks.anonymous - base.anonymous) / size,
        mapped=(peaks.mapped - base.mapped) / size,
        group=(peaks.group - base.group) / size if has_group else None,
        cache=(peaks.cache - base.cache) / size if has_group else None,
        goal=goal,
    )
