"""Throughput: examples and tokens a second, and model FLOPs utilization."""

from __future__ import annotations

import torch
from torch import nn

from trainer.distributed import collectives
from trainer.loggers import Metrics
from trainer.loop.run import Run
from trainer.models import SupportsFlops
from trainer.utils.hardware import DeviceRates, measure_flops, peak_flops


class ThroughputMeter:
    """Relates the throughput of a run to the peak of all its devices. All ranks make one together: a collective."""

    def __init__(self, run: Run, module: nn.Module):
        self.counts_tokens = run.task.unit_name == "token"
        self.model = module if isinstance(module, SupportsFlops) else None
        rates = device_rates(run) if self.model else DeviceRates()
        peak, measured = collectives.all_reduce_sum(
            torch.tensor([rates.peak, rates.measured], dtype=torch.float64)
        ).tolist()
        self.rates, self.measures = DeviceRates(peak, measured), run.metrics.measures_flops(run.topology.device)

    def metrics(self, metrics: Metrics, seconds: float) -> Metrics:
        """Return the throughput of a round.

        Args:
            metrics: of the round; its examples and units are used.
            seconds: that the round took.
        """
        examples, units = metrics["round/examples"], metrics["round/units"]
        throughput: Metrics = {"examples_per_second": examples / seconds}
        if self.counts_tokens:
            throughput["tokens_per_second"] = units / seconds
        if self.model and self.counts_tokens and examples:
            done = self.model.flops_per_token(round(units / examples)) * units / seconds
            throughput["mfu"] = done / self.rates.peak
            if self.measures:
                throughput["measured_mfu"] = done / self.rates.measured
        return throughput


def device_rates(run: Run) -> DeviceRates:
    """Return the FLOP/s of this rank's device: its peak, as the user or its maker states it, and the measured rate."""
    device = run.topology.device
    stated = run.metrics.peak_flops
    peak = peak_flops(device) / run.topology.ranks_on_device if stated == "auto" else stated
    if not run.metrics.measures_flops(device):
        return DeviceRates(peak)
    return DeviceRates(peak, measure_flops(device, run.autocast or torch.float32))
