"""SCAFFOLD: every client knows how its gradient differs from everybody's, and corrects each step by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.algorithms.base import Figures, InnerState, MakeOptimizer
from trainer.algorithms.client_result import Work
from trainer.algorithms.effective_steps import Probe, refuse_kept, refuse_nonlinear
from trainer.algorithms.fedavg import FedAvg, Weight, average
from trainer.algorithms.round import Round
from trainer.distributed.transport import Wire
from trainer.models.flat import FlatModel, Moments, resized
from trainer.optim import Clip


class Scaffold(FedAvg):
    """y <- y - eta (g_k(y) - c_k + c), then c_k <- c_k - c + (x - y) / a_k, and x and c by the means of the changes.

    Karimireddy et al. 2020 (arXiv 1910.06378), option II. a_k is K eta there; here it is the way that the client's
    optimizer makes under a gradient of 1, measured (see Probe), so that momentum, Nesterov and schedules keep the fixed
    point. c is sum_k p_k c_k with p_k = n_k / n over all clients: a cohort moves it by its sum of p_k (c_k+ - c_k),
    which is the paper's |S| / N times the mean when all weigh the same. The slots are those of FedAvg; clients begin
    every round without optimizer state, because a_k is measured so.
    """

    def __init__(
        self,
        server: MakeOptimizer = average,
        weight: Weight = "examples",
        cap: int | None = None,
        shared: str = ".*",
        inner_state: InnerState = "reset",
        batch_statistics: Moments = "pooled",
    ):
        refuse_kept("scaffold", inner_state)
        super().__init__(server, weight, cap, shared, inner_state, batch_statistics)

    @property
    def stateful(self) -> bool:
        return True

    def refuse(self, optimizer: MakeOptimizer, clip: Clip, clients: int) -> None:
        refuse_nonlinear("scaffold", optimizer, clip)

    def setup(self, model: FlatModel, optimizer: MakeOptimizer, client_weights: Sequence[float], wire: Wire) -> None:
        super().setup(model, optimizer, client_weights, wire)
        self.probe = Probe(optimizer)
        self.population = sum(self._weight(weight) for weight in client_weights)
        self.changes = torch.zeros_like(self.parameters)  # of this silo's control variates, times p_k
        self.control = torch.zeros_like(self.parameters)  # c
        self.own_control = self.control  # c_k of the client that trains
        self.correction = torch.zeros_like(model.shared)  # c - c_k, in the model's precision
        self.corrections = model.views(self.correction)

    def begin_round(self, round: Round) -> None:
        super().begin_round(round)
        self.changes.zero_()

    def begin_client(self, state: dict[str, Any], alone: bool = False) -> None:
        super().begin_client(state, alone)
        self._take(state.get("control", torch.zeros_like(self.control)))

    def correct(self) -> None:
        self.model.add_to_gradients(self.corrections)

    def client_state(self) -> dict[str, Any]:
        return {"control": self.own_control}

    def round_state(self) -> dict[str, Any]:
        return super().round_state() | {"own_control": self.own_control, "changes": self.changes}

    def load_round_state(self, state: dict[str, Any]) -> None:
        super().load_round_state(state)
        self.changes.copy_(resized(state["changes"], len(self.changes)))
        self._take(state["own_control"])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"control": self.control}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.control.copy_(resized(state["control"], len(self.control)))

    def _take(self, own_control: Tensor) -> None:
        """Trains with this control variate of the client."""
        self.own_control = resized(own_control, len(self.control))
        self.correction.copy_(self.control - self.own_control)

    def combine(self, sums: dict[str, float]) -> Figures:
        if not sums["weight"]:
            return super().combine(sums)
        arrivals = self.wire.start(self.changes, "control")  # in flight together with the deltas
        figures = super().combine(sums)
        for part, total in arrivals:
            self.control[part].add_(total)
        self.wire.join(self.control)
        return figures

    def _add(self, delta: Tensor, work: Work) -> None:
        way, share = self.probe.way(tuple(work.factors)), self._share(work)
        # c_k+ - c_k; a client that took no step, or has no examples, has learnt nothing of its gradient.
        change = delta / (share * way) - self.control if share * way else torch.zeros_like(delta)
        self.own_control = self.own_control + change
        self.changes.add_(change, alpha=self.weights[-1] / self.population)
        super()._add(delta, work)
