"""Nothing but the weighted mean of the models: what FedAvg is when nobody asks how far apart they were."""

from __future__ import annotations

import math

import torch

from trainer.algorithms.algorithm import Figures, InnerState
from trainer.algorithms.fedavg import FedAvg, Weight, average
from trainer.flat import Moments
from trainer.wires.wire import Arrivals
from trainer.work import Work


class Averaging(FedAvg):
    """w <- sum_k (n_k / n) w_k, McMahan et al. 2017 (arXiv 1602.05629), with one pass before the sum and one after it.

    FedAvg with the mean as its server says the same of the clients' deltas, and can do more: it leaves out clients
    whose numbers are not finite, measures the deltas, and has server optimizers. All of that takes passes over the
    memory, which for large models on a fast link cost as much as the sum. Here a number that is not finite ends the
    run. The slots are those of FedAvg.
    """

    sums_deltas = False
    votes = False

    def __init__(
        self,
        weight: Weight = "examples",
        cap: int | None = None,
        shared: str = ".*",
        inner_state: InnerState = "reset",
        batch_statistics: Moments = "pooled",
    ):
        super().__init__(average, weight, cap, shared, inner_state, batch_statistics)

    def contribute(self, work: Work) -> float:
        place = self.model.shared if self.parameters.dtype == self.model.shared.dtype else None
        self.weights.append(self._weight(work.weight))
        self._add(torch.mul(self.model.shared.to(self.parameters.dtype), self._share(work), out=place), work)
        return 0.0

    def header(self) -> dict[str, float]:
        return {"weight": math.fsum(self.weights)}

    def combine(self, sums: dict[str, float]) -> Figures:
        if sums["weight"]:
            self._take(self.wire.start(self._payload(sums), "models"))
        self._reset_model()
        return {}

    def _take(self, arrivals: Arrivals) -> None:
        for part, total in arrivals:
            self.parameters[part].copy_(total)
            if total.data_ptr() != self.model.shared[part].data_ptr():
                self.model.shared[part].copy_(total)
        self.wire.join(self.parameters)
        self.model_is_global = self.moves_all
