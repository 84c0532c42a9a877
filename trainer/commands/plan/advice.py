"""What would make the ranks compute for more of the time, by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from trainer.commands.plan.cost_model import CostModel
from trainer.commands.plan.estimate import Estimate, estimate, seconds_between

ENOUGH = 0.9  # of the time
WORTH = 0.02  # of the time: what gains less is not spoken of
MAX_SENTENCES = 3
MAX_TIMES = 1000  # as long as it is, a round may be made


def advice(costs: CostModel) -> list[str]:
    """One to three sentences, what helps most first."""
    now = estimate(costs)
    if now.utilisation >= ENOUGH:
        return [
            f"Nothing would help much: the ranks compute {now.utilisation:.0%} of the time. "
            "Faster ranks, or more in a silo, make rounds shorter."
        ]
    better = [(gained, said) for gained, said in _changes(costs, now) if gained >= now.utilisation + WORTH]
    ordered = sorted(better, key=lambda change: -change[0])[:MAX_SENTENCES]
    return [said for _, said in ordered] or ["No change of rounds or batches helps: see where the seconds go."]


def _changes(costs: CostModel, now: Estimate) -> Iterator[tuple[float, str]]:
    """The utilisation that each change would bring, and the change."""
    if costs.inter_silo:
        yield _longer_rounds(costs, now)
    if costs.inter_silo and costs.can_overlap and now.steps:
        yield _overlap(costs, now)
    if len(costs.compression_costs) > 1 and costs.inter_silo:
        yield _packing(costs)
    if now.averaging:
        yield _larger_batches(now)


def _longer_rounds(costs: CostModel, now: Estimate) -> tuple[float, str]:
    """As long as needed to be enough; where that cannot be, ten times as long."""
    once = now.passing + now.sending
    gain = now.computing - ENOUGH * (now.computing + now.averaging)
    times = ENOUGH * once / gain if gain > 0 else MAX_TIMES
    longer = estimate(costs, times if times < MAX_TIMES else 10)
    said = f"Rounds of {longer.steps:,} steps instead of {now.steps:,} bring the utilisation to"
    return longer.utilisation, f"{said} {longer.utilisation:.2f}: what is done once a round takes {once:.3g} s."


def _overlap(costs: CostModel, now: Estimate) -> tuple[float, str]:
    """By as many steps as hide what is sent, if a round has them."""
    a_step = (now.computing + now.averaging) / now.steps
    steps = min(math.ceil(seconds_between(costs) / a_step), now.steps)
    hidden = estimate(replace(costs, overlap=steps)).utilisation
    said = f"Training on while vectors are under way, algorithm=streaming with algorithm.overlap_steps={steps},"
    return hidden, f"{said} brings the utilisation to {hidden:.2f}."


def _packing(costs: CostModel) -> tuple[float, str]:
    """By the uplink that loses least, of those that bring about as much as any."""
    brought = {name: estimate(costs.with_uplink(name)).utilisation for name in costs.compression_costs}
    name = next(name for name in brought if brought[name] > max(brought.values()) - WORTH)
    bytes_left = costs.compression_costs[name].inter_silo_bytes / costs.traffic.inter_silo
    said = (
        f"update_compression={name} sends {bytes_left:.0%} of the bytes between the silos, and brings the utilisation"
    )
    return brought[name], f"{said} to {brought[name]:.2f}."


def _larger_batches(now: Estimate) -> tuple[float, str]:
    """Of twice the examples, whose gradients are averaged half as often."""
    doubled = now.computing / (now.seconds - now.averaging / 2)
    said = f"Averaging gradients inside the silos takes {now.averaging / now.seconds:.0%} of the time: twice the"
    return doubled, f"{said} batch_size does it half as often and brings the utilisation to {doubled:.2f}."
