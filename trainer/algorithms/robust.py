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

from trainer.algorithms.aggregation_rule import Aggregated, StackedUpdates
from trainer.algorithms.base import Metrics, Setting
from trainer.algorithms.drift_correction import unequal_weights
from trainer.distributed.transport import Transport

if TYPE_CHECKING:
    from trainer.algorithms.fedavg import FedAvg


@dataclass(frozen=True)
class TrimmedMean:
    """The mean without the extremes, coordinate by coordinate: Yin et al. 2018 (arXiv 1803.01498).

    Attributes:
        trim: the fraction of the values left out at each end, from 0 to below 1/2.
    """

    trim: float = 0.1
    is_sum = False

    def __post_init__(self):
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"algorithm.rule.trim={self.trim}\n  valid: a number from 0 to below 0.5")

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        return robust_errors(algorithm)

    def setup(self, transport: Transport) -> StackedUpdates:
        return StackedUpdates(transport, lambda rows, sum_slices: trimmed_mean(rows, self.trim))

    def metrics(self, sums: dict[str, float], aggregated: Aggregated) -> Metrics:
        return {"delta/norm": aggregated.norm}


@dataclass(frozen=True)
class Median:
    """The median, coordinate by coordinate: Yin et al. 2018 (arXiv 1803.01498)."""

    is_sum = False

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        return robust_errors(algorithm)

    def setup(self, transport: Transport) -> StackedUpdates:
        return StackedUpdates(transport, lambda rows, sum_slices: trimmed_mean(rows, 0.5))

    def metrics(self, sums: dict[str, float], aggregated: Aggregated) -> Metrics:
        return {"delta/norm": aggregated.norm}


@dataclass(frozen=True)
class Krum:
    """The updates closest to their neighbours: Blanchard et al. 2017 (NeurIPS).

    Attributes:
        byzantine: number of clients that may send anything; holds for 2 byzantine + 3 clients a round, or more.
        selected: the mean of this number of the best updates is taken.
    """

    byzantine: int = 1
    selected: int = 1
    is_sum = False

    def __post_init__(self):
        if self.byzantine < 0 or self.selected < 1:
            raise ValueError(
                f"algorithm.rule.byzantine={self.byzantine}, algorithm.rule.selected={self.selected}\n"
                "  valid: byzantine from 0, selected from 1"
            )

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        fewest, clients = 2 * self.byzantine + 3, setting.clients_per_round
        errors = robust_errors(algorithm)
        if clients < fewest:
            errors.append(
                f"algorithm.rule.byzantine={self.byzantine} with {clients} clients a round: krum holds for {fewest} "
                "or more.\n  set a smaller algorithm.rule.byzantine, more clients=, or a larger "
                "client_sampling.clients_per_round"
            )
        return errors

    def setup(self, transport: Transport) -> StackedUpdates:
        return StackedUpdates(transport, lambda rows, sum_slices: krum(rows, sum_slices, self.byzantine, self.selected))

    def metrics(self, sums: dict[str, float], aggregated: Aggregated) -> Metrics:
        return {"delta/norm": aggregated.norm}


def robust_errors(algorithm: FedAvg) -> list[str]:
    """Return what of an algorithm's options a robust rule cannot work with."""
    errors = unequal_weights("a robust rule", algorithm)
    if algorithm.drift_correction:
        errors.append(
            "algorithm.drift_correction with a robust rule: it needs the mean of the updates.\n"
            "  set algorithm.drift_correction=null, or algorithm=fedavg"
        )
    return errors


def trimmed_mean(rows: Tensor, trim: float) -> Tensor:
    """Return the mean of each column of rows [K, n] without its floor(trim K) least and greatest values.

    With trim 0.5 it is the median; of an even number of values that is the mean of the two in the middle.
    """
    clients = len(rows)
    left_out = min(int(trim * clients + 1e-9), (clients - 1) // 2)  # 0.29 of 100 is 29
    return rows.sort(0).values[left_out : clients - left_out].mean(0)


def krum(rows: Tensor, sum_slices: Callable[[Tensor], Tensor], byzantine: int, selected: int) -> Tensor:
    """Return the mean of the `selected` rows that are closest to their nearest K - byzantine - 2 others.

    The distance is the sum of the squared differences.

    Args:
        rows: some of the columns of the updates of all K clients, [K, n].
        sum_slices: sums a tensor over the ranks that have the other columns, in place.
        byzantine: number of clients that may send anything.
        selected: number of rows to take the mean of.
    """
    clients = len(rows)
    distances = sum_slices(torch.stack([(rows - row).double().square().sum(1) for row in rows]))
    # The first of a row's sorted distances is that to itself.
    nearest = distances.sort(1).values[:, 1 : max(clients - byzantine - 1, 2)]
    best = nearest.sum(1).argsort(stable=True)[:selected]
    return rows[best].mean(0)
