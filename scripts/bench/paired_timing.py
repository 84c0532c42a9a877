"""Paired timing: two sides alternate in the same workers, and the ratio of each pair is taken."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

Side = Callable[[int], None]


def in_workers(module: str, nproc: int = 2) -> bool:
    """Return whether this process is a worker; if not, run `python -m module` with the same arguments in workers."""
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        return True
    launcher = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(nproc),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([*launcher, "-m", module, *sys.argv[1:]], check=True, env=environment)
    return False


def duel(name: str, ours: Side, theirs: Side, pairs: int, unit: str, amount: float) -> float:
    """Return the median of theirs / ours over the pairs; the side that goes first alternates. Rank 0 prints a line.

    A side is called with the number of the pair. `amount` is the work of one call, counted in `unit`.
    """
    ours(0)
    theirs(0)
    times = []
    for pair in range(1, pairs + 1):
        if pair % 2:
            times.append((_timed(ours, pair), _timed(theirs, pair)))
        else:
            their_time, our_time = _timed(theirs, pair), _timed(ours, pair)
            times.append((our_time, their_time))
    ratios = sorted(b / a for a, b in times)
    if dist.get_rank() == 0:
        rates = [amount / median(side) for side in zip(*times, strict=True)]
        spread = f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f}"
        print(
            f"{name:<8} ours {rates[0]:>10,.1f} {unit}   by hand {rates[1]:>10,.1f} {unit}   "
            f"ratio {median(ratios):.3f}, middle half {spread}, {pairs} pairs",
            flush=True,
        )
    return median(ratios)


def machine() -> str:
    """Return a description of the machine and the versions."""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def _timed(side: Side, pair: int) -> float:
    dist.barrier()
    began = time.perf_counter()
    side(pair)
    dist.barrier()
    return time.perf_counter() - began
