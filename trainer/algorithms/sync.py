"""Plain synchronous data parallelism: nothing is combined, because there is nothing to combine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainer.algorithms.algorithm import InnerState
from trainer.cohort import Round
from trainer.flat import FlatModel


class Sync:
    """The null algorithm of one silo, whose model is the global one.

    It is a class of its own, and not FedAvg over one silo, because a - (a - p) is not p in floating point: only so is
    a run bit-equal to a hand-written DistributedDataParallel loop. Clients, if there are several, are trained as one.
    """

    inner_state: InnerState = "keep"
    pools_data = True
    votes = False
    stateful = True

    def is_shared(self, name: str) -> bool:
        return True

    def setup(self, model: FlatModel) -> None:
        self.nothing = model.shared.new_zeros(0)
        self.examples = 0

    def begin_round(self, round: Round) -> None:
        self.examples = 0

    def begin_client(self, client: int) -> None:
        pass

    def correct(self) -> None:
        pass

    def contribute(self, client: int, examples: int) -> float:
        self.examples += examples
        return 0.0

    def header(self) -> dict[str, float]:
        return {"weight": self.examples}

    def payload(self, weight: float) -> Tensor:
        return self.nothing

    def apply(self, total: Tensor) -> None:
        pass

    def skip(self) -> None:
        pass

    def round_state(self) -> dict[str, Any]:
        return {"examples": self.examples}

    def load_round_state(self, state: dict[str, Any]) -> None:
        self.examples = state["examples"]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
