"""Nothing but the weighted mean of the models: what FedAvg is when nobody asks how far apart they were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from trainer.algorithms.base import Figures, InnerState, MakeOptimizer
from trainer.algorithms.client_result import Work
from trainer.algorithms.fedavg import FedAvg, Weight, average
from trainer.distributed.transport import Wire
from trainer.distributed.transport.base import Arrivals
from trainer.models.flat import FlatModel, Moments


class Averaging(FedAvg):
    """w <- sum_k (n_k / n) w_k, McMahan et al. 2017 (arXiv 1602.05629), with one pass over the memory before the sum.

    FedAvg with the mean as its server says the same of the clients' deltas, and can do more: it leaves out clients
    whose numbers are not finite, measures the deltas, and has server optimizers. All of that takes passes over the
    memory, which for large models on a fast link cost as much as the sum. Here a number that is not finite ends the
    run. The slots are those of FedAvg.

    The mean comes into the model. A copy is kept only where a client might have to begin there after another one.
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

    def setup(self, model: FlatModel, optimizer: MakeOptimizer, client_weights: Sequence[float], wire: Wire) -> None:
        super().setup(model, optimizer, client_weights, wire)
        self.is_kept = True  # what is global, in `parameters`; else it is in the model alone

    def begin_client(self, state: dict[str, Any], alone: bool = False) -> None:
        # Without any weight nothing is combined, and the model is put back.
        if not self.is_kept and not (alone and self.planned_weight):
            self.parameters.copy_(self.model.shared)
            self.is_kept = True
        super().begin_client(state, alone)

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

    def round_state(self) -> dict[str, Any]:
        state = super().round_state()
        return state if self.is_kept else {name: part for name, part in state.items() if name != "parameters"}

    def load_round_state(self, state: dict[str, Any]) -> None:
        super().load_round_state({"parameters": self.parameters, **state})
        self.is_kept = "parameters" in state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.is_kept = True

    def _take(self, arrivals: Arrivals) -> None:
        self.is_kept = self.parameters.dtype != self.model.shared.dtype  # the model would round the mean
        mean = self.parameters if self.is_kept else self.model.shared
        for part, total in arrivals:
            if total.data_ptr() != mean[part].data_ptr():
                mean[part].copy_(total)
        self.wire.join(mean)
        self.model_is_global = not self.is_kept
