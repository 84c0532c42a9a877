"""The time, when a device has done what it was told."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch


def synchronized_time(device: torch.device) -> float:
    """Seconds since some time; on a GPU when all work before is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def median_seconds(action: Callable[[], object], device: torch.device, repetitions: int = 3) -> float:
    """The median of so many, after one that does not count."""
    action()
    times = []
    for _ in range(repetitions):
        began = synchronized_time(device)
        action()
        times.append(synchronized_time(device) - began)
    return median(times)
