"""What a rank computes on: how fast it could be, how much memory was held there, how tensors get there."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from trainer.utils.timing import median_seconds

# Dense bfloat16 operations a second by the words of a device's name, as its maker gives them; the first that fits.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
}

WIDTHS = {"cpu": 512, "cuda": 8192}  # of the matrices whose product is timed: some 30 milliseconds in all on a GPU
PRODUCTS = 15
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class DeviceRates:
    """Operations a second of one rank's device, or of those of several together; NaN is not known.

    peak      in dense bfloat16, as the maker gives it
    measured  in large matrix products
    """

    peak: float = math.nan
    measured: float = math.nan


def lookup_peak_flops(name: str) -> float:
    """The rate of the device of this name, as its maker gives it; NaN if it is not known, or only a part of a chip.

    >>> lookup_peak_flops("NVIDIA A100-SXM4-80GB"), lookup_peak_flops("NVIDIA H100 PCIe"), lookup_peak_flops("NVIDIA H100 80GB HBM3")
    (312000000000000.0, 756000000000000.0, 989000000000000.0)
    """
    words = set(re.findall(r"\w+", name))
    if "MIG" in words:
        return math.nan
    return next((rate for chip, rate in PEAK_FLOPS.items() if words.issuperset(chip.split())), math.nan)


def peak_flops(device: torch.device) -> float:
    """The rate of this device, as its maker gives it; NaN if it is not known."""
    return lookup_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else math.nan


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on this device, or on its way there: nobody waits for it but what is computed from it."""
    if tensor.device == device:
        return tensor
    # Only from pinned memory does a GPU copy by itself.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@cache
def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The operations a second of products of large square matrices of this type; 2 n^3 of a product. Waits for them."""
    width = WIDTHS[device.type]
    a, b = (torch.ones(width, width, dtype=dtype, device=device) for _ in "ab")
    product = partial(torch.mm, a, b, out=torch.empty_like(a))
    return 2 * width**3 / median_seconds(product, device, PRODUCTS)


def peak_memory_bytes(device: torch.device) -> float:
    """The most memory that this process has held since it began: tensors on a GPU, else all; NaN if nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return proc_status_bytes("VmHWM") if STATUS.exists() else math.nan


def proc_status_bytes(name: str) -> int:
    """What Linux says of this process's memory: VmRSS is what it holds, VmHWM the most that it has held."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
