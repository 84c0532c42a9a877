"""Plain synchronous data parallelism: nothing is combined, because there is nothing to combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.algorithms.base import Figures, InnerState, MakeOptimizer
from trainer.algorithms.client_result import Work
from trainer.algorithms.round import Round
from trainer.distributed.transport import Wire
from trainer.models.flat import FlatModel, Moments
from trainer.optim import Clip


class Sync:
    """The null algorithm of one silo, whose model is the global one.

    It is a class of its own, and not FedAvg over one silo, because a - (a - p) is not p in floating point: only so is
    a run bit-equal to a hand-written DistributedDataParallel loop. Clients, if there are several, are trained as one.
    """

    inner_state: InnerState = "keep"
    batch_statistics: Moments = "pooled"
    pools_data = True
    sums_deltas = False
    votes = False
    parts = ()
    overlap_steps = 0
    stateful = True

    def is_shared(self, name: str) -> bool:
        return True

    def refuse(self, optimizer: MakeOptimizer, clip: Clip, clients: int) -> None:
        pass

    def setup(self, model: FlatModel, optimizer: MakeOptimizer, client_weights: Sequence[float], wire: Wire) -> None:
        self.weight = 0

    def begin_round(self, round: Round) -> None:
        self.weight = 0

    def begin_client(self, state: dict[str, Any], alone: bool = False) -> None:
        pass

    def receive(self, steps: int) -> None:
        pass

    def correct(self) -> None:
        pass

    def contribute(self, work: Work) -> float:
        self.weight += work.weight
        return 0.0

    def client_state(self) -> dict[str, Any]:
        return {}

    def header(self) -> dict[str, float]:
        return {"weight": self.weight}

    def combine(self, sums: dict[str, float]) -> Figures:
        return {}

    def settle(self) -> None:
        pass

    def round_state(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_round_state(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def slice_state(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
