"""Plain synchronous data parallelism: one silo, whose every step moves the global model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.algorithms.base import (
    Algorithm,
    ClientOptimizerState,
    ClientSession,
    ClientState,
    Metrics,
    RoundSession,
    RunSession,
    Setting,
    T,
)
from trainer.algorithms.client_result import ClientResult
from trainer.algorithms.round import Round
from trainer.distributed.transport import Transport
from trainer.models.buffers import BatchNormReduction
from trainer.models.flat import FlatModel
from trainer.optim.optimizers import OptimizerFactory
from trainer.utils.errors import raise_errors


@dataclass(frozen=True)
class Sync(Algorithm):
    """The null algorithm of one silo, whose model is the global one. Clients, if there are several, train as one.

    It is a class of its own, and not FedAvg over one silo, because a - (a - p) is not p in floating point: only this
    makes a run bit-equal to a hand-written DistributedDataParallel loop.
    """

    client_optimizer_state: ClientOptimizerState = "keep"
    batchnorm_stats: BatchNormReduction = "pooled"
    moves_global_model = True
    needs_one_world = True

    @property
    def keeps_client_state(self) -> bool:
        return True

    def merge_clients(self, values: Sequence[T], merge: Callable[[Sequence[T]], T]) -> Sequence[T]:
        return (merge(values),)

    def validate(self, setting: Setting) -> None:
        errors: list[str] = []
        if setting.silos > 1:
            errors.append(
                f"silos={setting.silos} with algorithm=sync: it keeps one silo in step and combines nothing.\n"
                "  set silos=1, or algorithm=fedavg"
            )
        if setting.sampling:
            errors.append(
                f"client_sampling={setting.sampling} with algorithm=sync: it trains the examples of all "
                "clients as those of one, so there are none to draw from.\n"
                "  set client_sampling=all, or algorithm=fedavg"
            )
        if setting.drops_stragglers:
            errors.append(
                "round.stragglers=drop with algorithm=sync: there is one silo, and nothing but its work.\n"
                "  set round.stragglers=keep, or algorithm=fedavg"
            )
        if setting.finetuning_steps:
            errors.append(
                f"eval.personal_steps={setting.finetuning_steps} with algorithm=sync: it trains the examples of all "
                "clients as those of one.\n  set eval.personal_steps=0, or algorithm=fedavg"
            )
        if setting.compression:
            errors.append(
                f"update_compression={setting.compression} with algorithm=sync: there is one silo, and nothing goes "
                "between silos.\n  set update_compression=fp32, or algorithm=fedavg"
            )
        raise_errors(errors)

    def setup(
        self, model: FlatModel, optimizer: OptimizerFactory, client_weights: Sequence[float], transport: Transport
    ) -> SyncRun:
        return SyncRun(model)


class SyncRun(RunSession):
    """The model itself: it is the global one at every moment."""

    def __init__(self, model: FlatModel):
        self.model = model

    def start_round(self, round: Round) -> SyncRound:
        return SyncRound(self.model)

    def load_round(self, round: Round, state: dict[str, Any]) -> SyncRound:
        return SyncRound(self.model, state["weight"])

    def global_state(self) -> dict[str, Tensor]:
        return {"parameters": self.model.shared}

    def load_global_state(self, state: dict[str, Tensor]) -> None:
        self.model.shared.copy_(state["parameters"])


class SyncRound(RoundSession, ClientSession):
    """A round, and its only client's training: all is done in the steps."""

    def __init__(self, model: FlatModel, weight: float = 0):
        self.model, self.weight = model, weight

    def start_client(self, state: ClientState, exclusive: bool = False) -> SyncRound:
        return self

    def load_client(self, state: dict[str, Any]) -> SyncRound:
        return self

    def finish(self, result: ClientResult) -> tuple[float, ClientState]:
        self.weight += result.weight
        return 0.0, {}

    def scalars(self) -> dict[str, float]:
        return {"weight": self.weight}

    def aggregate(self, sums: dict[str, float]) -> Metrics:
        return {}

    def contribution(self) -> dict[str, Tensor]:
        raise AssertionError("one silo has nobody to contribute to")

    def contribution_like(self, clients: int) -> dict[str, Tensor]:
        return {}

    def merge(self, contribution: dict[str, Tensor], weight: float, factor: float = 1.0) -> None:
        raise AssertionError("one silo has nobody to merge with")

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}
