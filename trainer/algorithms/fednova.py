"""FedNova: clients that took more steps do not pull harder, because what each did is measured and divided out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.algorithms.base import Setting
from trainer.algorithms.client_result import ClientResult
from trainer.algorithms.drift_correction import Corrector, DriftCorrection, inexact_updates, kept_state
from trainer.algorithms.effective_steps import EffectiveSteps, moving_momentum, nonlinear_optimizer

if TYPE_CHECKING:
    from trainer.algorithms.fedavg import FedAvg, FedAvgRun


@dataclass(frozen=True)
class FedNova(DriftCorrection):
    """w <- server(w, a sum_k p_k (w - w_k) / a_k), with p_k = n_k / n and a = sum_k p_k a_k.

    Wang et al. 2020 (arXiv 2007.07481). a_k is the distance that client k's optimizer covers under a gradient of 1, the
    paper's ||a_k||_1 times the learning rate. It is measured (see Probe), so it is right for momentum, Nesterov,
    schedules, and for `proximal_mu`, the paper's proximal form. Clients begin every round without optimizer state,
    because a_k is measured that way.
    """

    rescales_updates = True

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        return [
            *kept_state("fednova", algorithm),
            *nonlinear_optimizer("fednova", setting.optimizer, setting.clip),
            *moving_momentum("fednova", setting.moves_momentum),
            *inexact_updates("fednova", algorithm),
        ]

    def setup(self, run: FedAvgRun) -> NormalizedAveraging:
        return NormalizedAveraging(EffectiveSteps(run.optimizer, run.options.proximal_mu))


class NormalizedAveraging(Corrector):
    """Divides each client's update by its a_k, and multiplies their mean by the mean of the a_k."""

    def __init__(self, probe: EffectiveSteps):
        self.probe = probe

    def measure(self, result: ClientResult) -> dict[str, float]:
        return {"effective_steps": self.probe.displacement(tuple(result.lr_factors))}

    def update_factor(self, measures: dict[str, float]) -> float:
        # A client that took no step has no update.
        return 1 / measures["effective_steps"] if measures["effective_steps"] else 0.0

    def mean_factor(self, sums: dict[str, float]) -> float:
        return sums["effective_steps"] / sums["weight"]
