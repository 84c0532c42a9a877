"""Timing of work on a device."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch


def synchronized_time(device: torch.device) -> float:
    """Return `perf_counter()` after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def median_seconds(action: Callable[[], object], device: torch.device, repetitions: int = 3) -> float:
    """Return the median seconds of several calls, after a warmup call."""
    action()
    times = []
    for _ in range(repetitions):
        start = synchronized_time(device)
        action()
        times.append(synchronized_time(device) - start)
    return median(times)
