"""FedNova: clients that did more steps do not pull harder, for what each did is measured and divided out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trainer.algorithms.base import Figures, InnerState, MakeOptimizer
from trainer.algorithms.client_result import Work
from trainer.algorithms.effective_steps import Probe, refuse_kept, refuse_nonlinear
from trainer.algorithms.fedavg import FedAvg, Weight, average, mean_cosine
from trainer.algorithms.round import Round
from trainer.distributed.transport import Wire
from trainer.models.flat import FlatModel, Moments
from trainer.optim import Clip


class FedNova(FedAvg):
    """w <- server(w, a sum_k p_k (w - w_k) / a_k), with p_k = n_k / n and a = sum_k p_k a_k.

    Wang et al. 2020 (arXiv 2007.07481). a_k is the way that client k's optimizer makes under a gradient of 1, the
    paper's ||a_k||_1 times the learning rate. It is measured (see Probe), so it is right for momentum, Nesterov,
    schedules, and for `pull`, the paper's proximal form. The slots are those of FedAvg; clients begin every round
    without optimizer state, because a_k is measured so.
    """

    def __init__(
        self,
        server: MakeOptimizer = average,
        weight: Weight = "examples",
        cap: int | None = None,
        shared: str = ".*",
        inner_state: InnerState = "reset",
        batch_statistics: Moments = "pooled",
        pull: float = 0.0,
    ):
        refuse_kept("fednova", inner_state)
        super().__init__(server, weight, cap, shared, inner_state, batch_statistics, pull)

    def refuse(self, optimizer: MakeOptimizer, clip: Clip, clients: int) -> None:
        refuse_nonlinear("fednova", optimizer, clip)

    def setup(self, model: FlatModel, optimizer: MakeOptimizer, client_weights: Sequence[float], wire: Wire) -> None:
        super().setup(model, optimizer, client_weights, wire)
        self.probe = Probe(optimizer, self.pull)
        self.ways: list[float] = []  # a_k of this silo's clients

    def begin_round(self, round: Round) -> None:
        super().begin_round(round)
        self.ways = []

    def header(self) -> dict[str, float]:
        return super().header() | {"ways": math.fsum(w * a for w, a in zip(self.weights, self.ways, strict=True))}

    def combine(self, sums: dict[str, float]) -> Figures:
        figures = super().combine(sums)
        mean_way = sums["ways"] / sums["weight"] if sums["weight"] else 0.0
        # The header's norms are of the deltas as they were added, each divided by its way.
        norm = figures["delta/norm"] / mean_way if mean_way else 0.0
        return figures | {"delta/cosine": mean_cosine(sums, norm)}

    def round_state(self) -> dict[str, Any]:
        return super().round_state() | {"ways": json.dumps(self.ways)}

    def load_round_state(self, state: dict[str, Any]) -> None:
        super().load_round_state(state)
        self.ways = json.loads(state["ways"])

    def _share(self, work: Work) -> float:
        return super()._share(work) * self._per_way(work)

    def _per_way(self, work: Work) -> float:
        """1 / a_k; 0 for a client that took no step, and so has no delta."""
        way = self.probe.way(tuple(work.factors))
        return 1 / way if way else 0.0

    def _add(self, delta: Tensor, work: Work) -> None:
        self.ways.append(self.probe.way(tuple(work.factors)))
        self.norms[-1] *= self._per_way(work)
        super()._add(delta, work)

    def _payload(self, sums: dict[str, float]) -> Tensor:
        return super()._payload(sums).mul_(sums["ways"] / sums["weight"])
