"""FedDyn: each client's loss gets a linear and a quadratic term, so that the optima of all become that of the sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.algorithms.base import Setting
from trainer.algorithms.client_result import ClientResult
from trainer.algorithms.drift_correction import Corrector, inexact_updates, proximal_term, unequal_weights

if TYPE_CHECKING:
    from trainer.algorithms.fedavg import FedAvg, FedAvgClient, FedAvgRun


@dataclass(frozen=True)
class FedDyn:
    """g_k <- g_k - l_k + alpha (w_k - w), then l_k <- l_k - alpha (w_k - w), and w <- mean_k w_k - h.

    Acar et al. 2021 (arXiv 2111.04263), algorithm 1; h here is the paper's h / alpha, summed by the server:
    h <- h + |P| / m mean_k (w - w_k) over the |P| of m clients that took part. All clients weigh the same.
    """

    alpha: float = 0.01
    keeps_client_state = True

    def __post_init__(self):
        if self.alpha <= 0:
            raise ValueError(f"algorithm.drift_correction.alpha={self.alpha}\n  valid: a number above 0")

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        checks = (unequal_weights, inexact_updates, proximal_term)
        return [error for check in checks for error in check("feddyn", algorithm)]

    def setup(self, run: FedAvgRun) -> DynamicRegularization:
        return DynamicRegularization(self.alpha, run)


class DynamicRegularization(Corrector):
    """The clients' l_k, and the server's h."""

    client_vectors = ("lagrangian",)

    def __init__(self, alpha: float, run: FedAvgRun):
        self.alpha, self.population = alpha, len(run.client_weights)
        self.vectors = {"drift": torch.zeros_like(run.global_model.parameters)}

    def start_vectors(self) -> Mapping[str, Tensor]:
        return {}  # h moves the server alone

    def start_client(self, client: FedAvgClient) -> None:
        client.add_vector(client.vectors["lagrangian"], -1.0)
        client.add_proximal_term(self.alpha)

    def finish_client(self, client: FedAvgClient, update: Tensor, share: float, result: ClientResult) -> None:
        client.vectors["lagrangian"] = client.vectors["lagrangian"] + update * (self.alpha / share)

    def correct(self, block: slice, update: Tensor, sums: dict[str, float]) -> None:
        update.add_(self.vectors["drift"][block].add_(update, alpha=sums["weight"] / self.population))
