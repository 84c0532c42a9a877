"""What would make the ranks compute for more of the time, by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.plan.costs import Costs
from trainer.plan.forecast import Forecast, forecast

ENOUGH = 0.9  # of the time
WORTH = 0.02  # of the time: what gains less is not spoken of
MOST_SAID = 3
MOST_TIMES = 1000  # as long as it is, a round may be made


def advice(costs: Costs) -> list[str]:
    """One to three sentences, what helps most first."""
    now = forecast(costs)
    if now.utilisation >= ENOUGH:
        return [
            f"Nothing would help much: the ranks compute {now.utilisation:.0%} of the time. "
            "Faster ranks, or more in a silo, make rounds shorter."
        ]
    better = [(gained, said) for gained, said in _changes(costs, now) if gained >= now.utilisation + WORTH]
    ordered = sorted(better, key=lambda change: -change[0])[:MOST_SAID]
    return [said for _, said in ordered] or ["No change of rounds or batches helps: see where the seconds go."]


def _changes(costs: Costs, now: Forecast) -> Iterator[tuple[float, str]]:
    """The utilisation that each change would bring, and the change."""
    yield from _longer_rounds(costs, now)
    if now.averaging:
        other = now.passing + now.sending
        doubled = now.computing / (now.computing + now.averaging / 2 + other)
        part = now.averaging / now.seconds
        yield (
            doubled,
            f"Averaging gradients inside the silos takes {part:.0%} of the time: twice the batch_size does it half as "
            f"often and brings the utilisation to {doubled:.2f}.",
        )


def _longer_rounds(costs: Costs, now: Forecast) -> Iterator[tuple[float, str]]:
    """As long as needed to be enough; where that cannot be, ten times as long."""
    if costs.between is None:
        return
    once = now.passing + now.sending
    gain = now.computing - ENOUGH * (now.computing + now.averaging)
    times = ENOUGH * once / gain if gain > 0 else MOST_TIMES
    longer = forecast(costs, times if times < MOST_TIMES else 10)
    said = f"Rounds of {longer.steps:,} steps instead of {now.steps:,} bring the utilisation to"
    yield longer.utilisation, f"{said} {longer.utilisation:.2f}: what is done once a round takes {once:.3g} s."
