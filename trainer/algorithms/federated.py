"""Shared by federated algorithms: choices, the global parameters of a run, and the weights of a round's clients."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trainer.algorithms.base import Algorithm, ClientOptimizerState, RoundSession, RunSession, Setting
from trainer.algorithms.global_model import GlobalModel
from trainer.algorithms.round import Round
from trainer.distributed.transport import Transport
from trainer.models.buffers import BatchNormReduction
from trainer.models.flat import FlatModel
from trainer.optim.optimizers import OptimizerFactory

Weighting = Literal["examples", "equal", "capped"]

mean: OptimizerFactory = partial(torch.optim.SGD, lr=1.0)


@dataclass(frozen=True, kw_only=True)
class FederatedOptions(Algorithm):
    """Choices of federated algorithms. Abstract: it has no training of its own.

    Attributes:
        weighting: of a client in the mean. `examples`: n_k, its number of training examples or the sum of their
            weights; `equal`: 1; `capped`: n_k, but at most `max_weight`.
        shared_params: regular expression; parameters and buffers whose names it finds are combined, the others are
            personal and stay with their client. `.*` is all, `$^` none.
        client_optimizer_state: `reset` a client's optimizer between its rounds, or `keep` its state.
        batchnorm_stats: combine BatchNorm's statistics `pooled` as those of all examples, or as their plain `mean`.
    """

    weighting: Weighting = "examples"
    max_weight: int | None = None
    shared_params: str = ".*"
    client_optimizer_state: ClientOptimizerState = "reset"
    batchnorm_stats: BatchNormReduction = "pooled"

    def __post_init__(self):
        choices = {
            "weighting": Weighting,
            "client_optimizer_state": ClientOptimizerState,
            "batchnorm_stats": BatchNormReduction,
        }
        for name, valid in choices.items():
            if getattr(self, name) not in get_args(valid):
                raise ValueError(f"algorithm.{name}={getattr(self, name)}\n  valid: {', '.join(get_args(valid))}")
        given = self.max_weight
        if (self.weighting == "capped") != (given is not None) or (given is not None and given < 1):
            raise ValueError(
                f"algorithm.weighting={self.weighting} with algorithm.max_weight={'null' if given is None else given}\n"
                "  valid: weighting=capped with a max_weight from 1, or another weighting with max_weight=null"
            )
        re.compile(self.shared_params)

    @property
    def keeps_client_state(self) -> bool:
        return self.client_optimizer_state == "keep" or self.has_personal

    @property
    def has_personal(self) -> bool:
        """Whether some parameters or buffers are personal."""
        return self.shared_params != ".*"

    def is_shared(self, name: str) -> bool:
        return re.search(self.shared_params, name) is not None

    def weight_of(self, examples: float) -> float:
        """Return the weight in the mean of a client with this n_k."""
        if self.weighting == "equal":
            return 1.0
        return float(examples if self.max_weight is None else min(examples, self.max_weight))

    def total_weight(self, examples: Iterable[float]) -> float:
        """Return the weight in the mean of all clients with these n_k."""
        return math.fsum(map(self.weight_of, examples))


class FederatedRun(RunSession):
    """Base of runs whose silos send updates, by which a server optimizer moves the global parameters.

    Attributes:
        model: what clients train.
        client_weights: n_k of all clients.
        global_model: the global parameters, and what moves them.
    """

    def __init__(
        self,
        server: OptimizerFactory,
        model: FlatModel,
        client_weights: Sequence[float],
        transport: Transport,
        parts: Sequence[slice],
    ):
        self.model, self.client_weights, self.transport, self.parts = model, client_weights, transport, parts
        self.global_model = GlobalModel(model, transport, server, parts)

    def reset_model(self) -> None:
        self.global_model.reset_model()

    def global_state(self) -> dict[str, Tensor]:
        return {"parameters": self.global_model.parameters}

    def load_global_state(self, state: dict[str, Tensor]) -> None:
        self.global_model.set(state["parameters"])
        self.reset_model()

    def state_dict(self) -> dict[str, Any]:
        return self.global_model.state_dict()

    def sharded_state_dict(self) -> dict[str, Any]:
        return self.global_model.sharded_state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.global_model.load_state_dict(state)


class FederatedRound(RoundSession):
    """Base of rounds that weigh the updates of clients, and measure them.

    Attributes:
        planned_weight: the weight of all clients of the round.
        weights: of the clients of this silo that have finished.
        norms: of their updates.
    """

    def __init__(self, options: FederatedOptions, client_weights: Sequence[float], round: Round):
        self.planned_weight = options.total_weight(client_weights[client] for client in round.cohort)
        self.weights: list[float] = []
        self.norms: list[float] = []

    def scalars(self) -> dict[str, float]:
        pairs = list(zip(self.weights, self.norms, strict=True))
        return {
            "weight": math.fsum(self.weights),
            "weighted_norms": math.fsum(w * d for w, d in pairs),
            "squared_weighted_norms": math.fsum((w * d) ** 2 for w, d in pairs),
        }


def compression_error(setting: Setting) -> list[str]:
    """Return what is wrong with compressing updates, where something else than their sums is sent."""
    if setting.compression is None:
        return []
    return [
        f"update_compression={setting.compression} with an algorithm that sends something else than sums of "
        "updates, such as median or averaging.\n  set update_compression=fp32, or algorithm=fedavg"
    ]
