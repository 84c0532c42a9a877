"""Aggregation rules: how the updates of a round's clients become one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trainer.algorithms.base import Metrics, Setting
from trainer.algorithms.updates import SummedUpdates, Updates
from trainer.distributed.transport import Transport

if TYPE_CHECKING:
    from trainer.algorithms.fedavg import FedAvg


class AggregationRule(Protocol):
    """A choice of rule. A frozen value.

    Attributes:
        is_sum: whether silos send sums, which may be compressed.
    """

    is_sum: bool = False

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        """Return the reasons why the rule cannot work with these choices."""
        ...

    def setup(self, transport: Transport) -> Updates:
        """Return the updates of a round, empty, to be combined by this rule."""
        ...

    def metrics(self, sums: dict[str, float], norm: float, factor: float) -> Metrics:
        """Return the metrics of a combination.

        Args:
            sums: the scalars of all silos.
            norm: the 2-norm of the combined update.
            factor: multiplied it; 0 if nobody took part.
        """
        return {"delta/norm": norm}


@dataclass(frozen=True)
class Mean(AggregationRule):
    """The mean of the updates by the clients' weights."""

    is_sum = True

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        return []

    def setup(self, transport: Transport) -> SummedUpdates:
        return SummedUpdates(transport)

    def metrics(self, sums: dict[str, float], norm: float, factor: float) -> Metrics:
        # The scalars' norms are of updates as they were added, before the factor.
        return {"delta/norm": norm, "delta/cosine": mean_cosine(sums, norm / factor if factor else 0.0)}


def mean_cosine(sums: dict[str, float], norm: float) -> float:
    """Return the mean cosine between pairs of clients' updates, weighted by w_i |d_i| w_j |d_j|; NaN for one client.

    (|sum w_i d_i|^2 - sum w_i^2 |d_i|^2) / ((sum w_i |d_i|)^2 - sum w_i^2 |d_i|^2): three sums of scalars and the norm
    of the weighted mean, so no client's update is sent anywhere.
    """
    if not sums["weight"]:
        return math.nan
    squares = sums["squared_weighted_norms"] / sums["weight"] ** 2
    pairs = (sums["weighted_norms"] / sums["weight"]) ** 2 - squares
    # A single client leaves the rounding of 0 / 0.
    return (norm**2 - squares) / pairs if pairs > 1e-9 * squares else math.nan
