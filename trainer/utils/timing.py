"""The time, when a device has done what it was told."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch


def clock(device: torch.device) -> float:
    """Seconds since some time; on a GPU when all work before is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def seconds_of(action: Callable[[], object], device: torch.device, repetitions: int = 3) -> float:
    """The median of so many, after one that does not count."""
    action()
    times = []
    for _ in range(repetitions):
        began = clock(device)
        action()
        times.append(clock(device) - began)
    return median(times)
