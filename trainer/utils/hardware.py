"""The device of a rank: peak and measured FLOP/s, peak memory, and transfers to it."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from trainer.utils.tensor_trees import Tree, map_tensors
from trainer.utils.timing import median_seconds

# Dense bfloat16 FLOP/s from the vendors' data sheets, by the words of a device name; the first match counts.
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

WIDTHS = {"cpu": 512, "cuda": 8192}  # of the matrices whose product is timed; takes 30 ms on a GPU
PRODUCTS = 15
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class DeviceRates:
    """FLOP/s of a rank's device, or the sum over several ranks; NaN if unknown.

    peak: the vendor's figure for dense bfloat16.
    measured: in large matrix products.
    """

    peak: float = math.nan
    measured: float = math.nan


def lookup_peak_flops(name: str) -> float:
    """Return the vendor's dense bfloat16 FLOP/s by device name; NaN for unknown devices and MIG instances.

    >>> [lookup_peak_flops(f"NVIDIA {name}") for name in ("A100-SXM4-80GB", "H100 PCIe", "H100 80GB HBM3")]
    [312000000000000.0, 756000000000000.0, 989000000000000.0]
    """
    words = set(re.findall(r"\w+", name))
    if "MIG" in words:
        return math.nan
    return next((rate for chip, rate in PEAK_FLOPS.items() if words.issuperset(chip.split())), math.nan)


def peak_flops(device: torch.device) -> float:
    """Return the vendor's dense bfloat16 FLOP/s of this device; NaN if unknown."""
    return lookup_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else math.nan


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Copy tensors to the device, asynchronously if it is a GPU; return those themselves that are already there."""
    return map_tensors(lambda tensor: tensor if tensor.device == device else _copy(tensor, device), tree)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    # Copies to a GPU are asynchronous only from pinned memory.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@cache
def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of products of large square matrices; a product of n x n matrices counts 2 n^3."""
    width = WIDTHS[device.type]
    a, b = (torch.ones(width, width, dtype=dtype, device=device) for _ in "ab")
    product = partial(torch.mm, a, b, out=torch.empty_like(a))
    return 2 * width**3 / median_seconds(product, device, PRODUCTS)


def peak_memory_bytes(device: torch.device) -> float:
    """Return the peak memory of this process: of tensors on a GPU, else of the whole process; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return proc_status_bytes("VmHWM") if STATUS.exists() else math.nan


def system_load(device: torch.device) -> dict[str, float]:
    """Return the load of this machine, and of the GPU of this process if it has one.

    The share of the processors in use is that since the last call. That of the GPU needs the package nvidia-ml-py.
    """
    load: dict[str, float] = {
        "cpu_percent": psutil.cpu_percent(),
        "memory_percent": psutil.virtual_memory().percent,
        "process_memory_bytes": psutil.Process().memory_info().rss,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        load["gpu_memory_percent"] = 100 * (1 - free / total)
        with suppress(ModuleNotFoundError, RuntimeError):
            load["gpu_percent"] = torch.cuda.utilization(device)
    return load


def proc_status_bytes(name: str) -> int:
    """Return a memory counter of this process from Linux: VmRSS is its current memory, VmHWM its peak memory."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
