"""Robust rules: a few clients that send arbitrary updates cannot carry the model where they want.

All clients weigh the same. Parameters are guarded; BatchNorm's statistics are not, they are pooled over all clients. A
silo keeps the updates of all its clients until the end of the round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.algorithms.aggregation_rule import AggregationRule
from trainer.algorithms.base import Setting
from trainer.algorithms.drift_correction import unequal_weights
from trainer.algorithms.updates import StackedUpdates
from trainer.distributed.transport import Transport

if TYPE_CHECKING:
    from trainer.algorithms.fedavg import FedAvg


@dataclass(frozen=True)
class RobustRule(AggregationRule):
    """Base of robust rules, which override `combine`."""

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        errors = unequal_weights("a robust rule", algorithm)
        if algorithm.drift_correction:
            errors.append(
                "algorithm.drift_correction with a robust rule: it needs the mean of the updates.\n"
                "  set algorithm.drift_correction=null, or algorithm=fedavg"
            )
        return errors

    def setup(self, transport: Transport) -> StackedUpdates:
        return StackedUpdates(transport, self.combine)

    def combine(self, rows: Tensor, sum_slices: Callable[[Tensor], Tensor]) -> Tensor:
        """Combine some of the columns of the updates of all K clients, [K, n], to one row.

        Args:
            rows: the columns.
            sum_slices: sums a tensor over the ranks that have the other columns, in place.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TrimmedMean(RobustRule):
    """The mean without the extremes, coordinate by coordinate: Yin et al. 2018 (arXiv 1803.01498).

    Attributes:
        trim: the fraction of the values left out at each end, from 0 to below 1/2.
    """

    trim: float = 0.1

    def __post_init__(self):
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"algorithm.rule.trim={self.trim}\n  valid: a number from 0 to below 0.5")

    def combine(self, rows: Tensor, sum_slices: Callable[[Tensor], Tensor]) -> Tensor:
        return trimmed_mean(rows, self.trim)


@dataclass(frozen=True)
class Median(RobustRule):
    """The median, coordinate by coordinate: Yin et al. 2018 (arXiv 1803.01498)."""

    def combine(self, rows: Tensor, sum_slices: Callable[[Tensor], Tensor]) -> Tensor:
        return trimmed_mean(rows, 0.5)


@dataclass(frozen=True)
class Krum(RobustRule):
    """The updates closest to their neighbours: Blanchard et al. 2017 (NeurIPS).

    It is the mean of the `selected` updates of which the sum of the squared distances to the K - byzantine - 2 nearest
    others is least.

    Attributes:
        byzantine: number of clients that may send anything; holds for 2 byzantine + 3 clients a round, or more.
        selected: the mean of this number of the best updates is taken.
    """

    byzantine: int = 1
    selected: int = 1

    def __post_init__(self):
        if self.byzantine < 0 or self.selected < 1:
            raise ValueError(
                f"algorithm.rule.byzantine={self.byzantine}, algorithm.rule.selected={self.selected}\n"
                "  valid: byzantine from 0, selected from 1"
            )

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        fewest, clients = 2 * self.byzantine + 3, setting.clients_per_round
        errors = super().errors(algorithm, setting)
        if clients < fewest:
            errors.append(
                f"algorithm.rule.byzantine={self.byzantine} with {clients} clients a round: krum holds for {fewest} "
                "or more.\n  set a smaller algorithm.rule.byzantine, more clients=, or a larger "
                "client_sampling.clients_per_round"
            )
        return errors

    def combine(self, rows: Tensor, sum_slices: Callable[[Tensor], Tensor]) -> Tensor:
        clients = len(rows)
        distances = sum_slices(torch.stack([(rows - row).double().square().sum(1) for row in rows]))
        # The first of a row's sorted distances is that to itself.
        nearest = distances.sort(1).values[:, 1 : max(clients - self.byzantine - 1, 2)]
        best = nearest.sum(1).argsort(stable=True)[: self.selected]
        return rows[best].mean(0)


def trimmed_mean(rows: Tensor, trim: float) -> Tensor:
    """Return the mean of each column of rows [K, n] without its floor(trim K) least and greatest values.

    With trim 0.5 it is the median; of an even number of values that is the mean of the two in the middle.
    """
    clients = len(rows)
    left_out = min(int(trim * clients + 1e-9), (clients - 1) // 2)  # 0.29 of 100 is 29
    return rows.sort(0).values[left_out : clients - left_out].mean(0)
