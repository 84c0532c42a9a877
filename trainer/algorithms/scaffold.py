"""SCAFFOLD: each client knows how its gradient differs from everybody's, and corrects its steps by the difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.algorithms.base import Setting
from trainer.algorithms.client_result import ClientResult
from trainer.algorithms.drift_correction import Corrector, DriftCorrection, inexact_updates, kept_state, proximal_term
from trainer.algorithms.effective_steps import EffectiveSteps, moving_momentum, nonlinear_optimizer

if TYPE_CHECKING:
    from trainer.algorithms.fedavg import FedAvg, FedAvgClient, FedAvgRun


@dataclass(frozen=True)
class Scaffold(DriftCorrection):
    """y <- y - eta (g_k(y) - c_k + c), then c_k <- c_k - c + (x - y) / a_k, and x and c by the means of the changes.

    Karimireddy et al. 2020 (arXiv 1910.06378), option II. a_k is K eta there; here it is the distance that the client's
    optimizer covers under a gradient of 1, measured (see Probe), so that momentum, Nesterov and schedules keep the
    fixed point. c is sum_k p_k c_k with p_k = n_k / n over all clients: a round moves it by its clients' sum of
    p_k (c_k+ - c_k), which is the paper's |S| / N times the mean when all weigh the same. Clients begin every round
    without optimizer state, because a_k is measured that way.
    """

    keeps_client_state = True

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        return [
            *kept_state("scaffold", algorithm),
            *nonlinear_optimizer("scaffold", setting.optimizer, setting.clip),
            *moving_momentum("scaffold", setting.moves_momentum),
            *inexact_updates("scaffold", algorithm),
            *proximal_term("scaffold", algorithm),
        ]

    def setup(self, run: FedAvgRun) -> ControlVariates:
        return ControlVariates(run)


class ControlVariates(Corrector):
    """The control variates c of the server, c_k of the clients."""

    summed = client_vectors = ("control",)

    def __init__(self, run: FedAvgRun):
        self.probe = EffectiveSteps(run.optimizer)
        self.population = sum(map(run.options.weight_of, run.client_weights))
        self.control = torch.zeros_like(run.global_model.parameters)
        self.vectors = {"control": self.control}

    def start_client(self, client: FedAvgClient) -> None:
        client.add_vector(self.control - client.vectors["control"])

    def finish_client(self, client: FedAvgClient, update: Tensor, share: float, result: ClientResult) -> None:
        scale = share * self.probe.displacement(tuple(result.lr_factors))
        # c_k+ - c_k; a client that took no step, or has no examples, has learnt nothing of its gradient.
        change = update / scale - self.control if scale else torch.zeros_like(update)
        client.vectors["control"] = client.vectors["control"] + change
        client.round.sums["control"].add_(change, alpha=client.round.weights[-1] / self.population)
