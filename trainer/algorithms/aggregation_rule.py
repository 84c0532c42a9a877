"""Aggregation rules: how the updates of a round's clients become one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from trainer.algorithms.base import Metrics, Setting
from trainer.algorithms.running_sum import RunningSum
from trainer.distributed.transport import Transport
from trainer.distributed.transport.base import ReducedChunks
from trainer.models.flat import pad_or_trim

if TYPE_CHECKING:
    from trainer.algorithms.fedavg import FedAvg


@dataclass(frozen=True)
class Aggregated:
    """The result of a combination: the norm of the mean update, and the factor that it was multiplied by."""

    norm: float = 0.0
    factor: float = 0.0


class Updates(Protocol):
    """The updates of this silo's clients in a round."""

    def clear(self) -> None:
        """Begin a round."""
        ...

    def detach(self) -> None:
        """Let go of the model's memory, which the last update may lie in."""
        ...

    def share(self, weight: float, planned_weight: float) -> float:
        """Return what the update of a client is multiplied by before it is added."""
        ...

    def add(self, update: Tensor) -> None:
        """Add a client's update."""
        ...

    def reduce(self, planned_weight: float, weight: float, factor: float, like: Tensor) -> ReducedChunks:
        """Combine the updates of all silos, times a factor; parts of the result as they come in. A collective.

        Args:
            planned_weight: the weight of all clients of the round.
            weight: the weight of the clients that took part, over all silos.
            factor: multiplies the result.
            like: a vector of the result's length, dtype and device.
        """
        ...

    def contribution(self, like: Tensor) -> dict[str, Tensor]:
        """Return what this silo has, by name."""
        ...

    def merge(self, contribution: dict[str, Tensor], factor: float) -> None:
        """Add the `contribution` of another silo, times a factor."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the live state of the middle of a round."""
        ...

    def load_state_dict(self, state: dict[str, Any], length: int) -> None:
        """Restore a `state_dict`, for vectors of this length."""
        ...


class AggregationRule(Protocol):
    """A choice of rule. A frozen value.

    Attributes:
        is_sum: whether silos send sums, which may be compressed.
    """

    @property
    def is_sum(self) -> bool: ...

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        """Return the reasons why the rule cannot work with these choices."""
        ...

    def setup(self, transport: Transport) -> Updates:
        """Return the updates of a round, empty, to be combined by this rule."""
        ...

    def metrics(self, sums: dict[str, float], aggregated: Aggregated) -> Metrics:
        """Return the metrics of a combination, given the scalars of all silos."""
        ...


@dataclass(frozen=True)
class Mean:
    """The mean of the updates by the clients' weights."""

    is_sum = True

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        return []

    def setup(self, transport: Transport) -> SummedUpdates:
        return SummedUpdates(transport)

    def metrics(self, sums: dict[str, float], aggregated: Aggregated) -> Metrics:
        # The scalars' norms are of updates as they were added, before the factor.
        norm = aggregated.norm / aggregated.factor if aggregated.factor else 0.0
        return {"delta/norm": aggregated.norm, "delta/cosine": mean_cosine(sums, norm)}


class SummedUpdates:
    """Updates as one sum, of shares of the weight that the round was planned with."""

    def __init__(self, transport: Transport):
        self.transport, self.sum = transport, RunningSum()

    def clear(self) -> None:
        self.sum.clear()

    def detach(self) -> None:
        self.sum.detach()

    def share(self, weight: float, planned_weight: float) -> float:
        return weight / (planned_weight or 1.0)

    def add(self, update: Tensor) -> None:
        self.sum.add(update)

    def reduce(self, planned_weight: float, weight: float, factor: float, like: Tensor) -> ReducedChunks:
        return self.transport.all_reduce_async(self.reduced(planned_weight, weight, factor, like), "delta")

    def reduced(self, planned_weight: float, weight: float, factor: float, like: Tensor) -> Tensor:
        """Return this silo's part of the mean over all silos, times a factor."""
        vector = self.sum.value()
        if vector is None:
            vector = torch.zeros_like(like)
        elif weight != planned_weight:
            vector.mul_(planned_weight / weight)
        if factor != 1.0:
            vector.mul_(factor)
        return vector

    def contribution(self, like: Tensor) -> dict[str, Tensor]:
        vector = self.sum.value()
        return {"delta": torch.zeros_like(like) if vector is None else vector}

    def merge(self, contribution: dict[str, Tensor], factor: float) -> None:
        self.sum.add(contribution["delta"] * factor)

    def state_dict(self) -> dict[str, Any]:
        self.sum.detach()
        return {"sum": self.sum.total} if self.sum.has_total else {}

    def load_state_dict(self, state: dict[str, Any], length: int) -> None:
        if "sum" in state:
            self.sum.load(pad_or_trim(state["sum"], length))


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


class StackedUpdates:
    """Updates as rows, one a client, which a robust rule combines. No rank ever holds the rows of all silos whole."""

    def __init__(self, transport: Transport, rule: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]):
        self.transport, self.rule = transport, rule
        self.rows: list[Tensor] = []

    def clear(self) -> None:
        self.rows = []

    def detach(self) -> None:
        pass

    def share(self, weight: float, planned_weight: float) -> float:
        return 1.0

    def add(self, update: Tensor) -> None:
        self.rows.append(update.clone())

    def reduce(self, planned_weight: float, weight: float, factor: float, like: Tensor) -> ReducedChunks:
        combined = self.transport.all_reduce_columns(self._stacked(like), self.rule)
        self.clear()
        return ((part, combined[part]) for part in self.transport.chunks(len(combined)))

    def contribution(self, like: Tensor) -> dict[str, Tensor]:
        return {"rows": self._stacked(like)}

    def merge(self, contribution: dict[str, Tensor], factor: float) -> None:
        self.rows += contribution["rows"].unbind()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": {str(place): row for place, row in enumerate(self.rows)}}

    def load_state_dict(self, state: dict[str, Any], length: int) -> None:
        rows = state["rows"]
        self.rows = [pad_or_trim(rows[str(place)], length) for place in range(len(rows))]

    def _stacked(self, like: Tensor) -> Tensor:
        return torch.stack(self.rows) if self.rows else like.new_zeros(0, len(like))
