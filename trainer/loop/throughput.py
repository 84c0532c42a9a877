"""How fast a round was: examples and tokens a second, and its operations as parts of what the chips could do."""

from __future__ import annotations

import torch

from trainer.distributed import collectives
from trainer.loggers import Metrics
from trainer.loop.run import Run
from trainer.models import SupportsFlops
from trainer.tasks import LanguageModelling
from trainer.utils.hardware import DeviceRates, measure_flops, peak_flops


class ThroughputMeter:
    """What the ranks of a run could do together, and what they have done of it. Made by all of them: a collective."""

    def __init__(self, run: Run):
        self.counts_tokens = isinstance(run.task, LanguageModelling)
        self.model = run.module if isinstance(run.module, SupportsFlops) else None
        own = device_rates(run) if self.model else DeviceRates()
        peak, measured = collectives.all_reduce_sum(
            torch.tensor([own.peak, own.measured], dtype=torch.float64)
        ).tolist()
        self.rates, self.measures = DeviceRates(peak, measured), run.measures_flops

    def metrics(self, metrics: Metrics, seconds: float) -> Metrics:
        """The figures of a round that has taken so many seconds, from its examples and units."""
        examples, units = metrics["round/examples"], metrics["round/units"]
        figures: Metrics = {"examples_per_second": examples / seconds}
        if self.counts_tokens:
            figures["tokens_per_second"] = units / seconds
        if self.model and self.counts_tokens and examples:
            done = self.model.flops_per_token(round(units / examples)) * units / seconds
            figures["mfu"] = done / self.rates.peak
            if self.measures:
                figures["measured_mfu"] = done / self.rates.measured
        return figures


def device_rates(run: Run) -> DeviceRates:
    """What this rank's device could do: as the user says, as its maker does, and as it has shown now."""
    device = run.topology.device
    peak = peak_flops(device) / run.topology.ranks_on_device if run.peak_flops is None else run.peak_flops
    if not run.measures_flops:
        return DeviceRates(peak)
    return DeviceRates(peak, measure_flops(device, run.autocast or torch.float32))
