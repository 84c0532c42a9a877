"""Peak FLOP/s by the device names of drivers, measured FLOP/s, and peak memory."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.utils.hardware import lookup_peak_flops, measure_flops, peak_flops, peak_memory_bytes

CPU = torch.device("cpu")

# As returned by torch.cuda.get_device_name.
NAMES = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA B200": 2250e12,
}


@pytest.mark.parametrize(("name", "rate"), NAMES.items())
def test_a_known_name_has_the_rate_of_its_data_sheet(name: str, rate: float) -> None:
    assert lookup_peak_flops(name) == rate


@pytest.mark.parametrize("name", ["", "NVIDIA L40", "NVIDIA H1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Tesla V100"])
def test_a_name_similar_to_a_known_one_has_none(name: str) -> None:
    assert math.isnan(lookup_peak_flops(name))


def test_a_cpu_has_no_peak_but_can_be_measured() -> None:
    """The limits, 10^8 and 10^15 FLOP/s, hold for any CPU."""
    assert math.isnan(peak_flops(CPU))
    assert 1e8 < measure_flops(CPU, torch.float32) < 1e15


def test_peak_memory_grows_with_allocations_and_stays() -> None:
    before = peak_memory_bytes(CPU)
    held = torch.ones(2 * int(before) // 4)
    grown = peak_memory_bytes(CPU)
    assert grown >= held.nbytes > before
    del held
    assert peak_memory_bytes(CPU) > 0.99 * grown  # the kernel counts in batches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_is_not_faster_than_its_data_sheet() -> None:
    gpu = torch.device("cuda", 0)
    assert not measure_flops(gpu, torch.bfloat16) > 1.05 * peak_flops(gpu)
    assert peak_memory_bytes(gpu) > 0
