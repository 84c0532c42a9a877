"""Model averaging: nothing but the weighted mean of the models, without a measure of how far apart they were."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.algorithms.base import ClientSession, ClientState, Metrics, RoundSession, RunSession, Setting
from trainer.algorithms.client_result import ClientResult
from trainer.algorithms.federated import FederatedOptions, compression_error
from trainer.algorithms.round import Round
from trainer.algorithms.updates import SummedUpdates
from trainer.distributed.transport import Transport
from trainer.models.flat import FlatModel, pad_or_trim
from trainer.optim.optimizers import OptimizerFactory
from trainer.utils.errors import raise_errors


@dataclass(frozen=True, kw_only=True)
class ModelAveraging(FederatedOptions):
    """w <- sum_k (n_k / n) w_k, McMahan et al. 2017 (arXiv 1602.05629), with one pass over the memory before the sum.

    FedAvg with the mean as its server computes the same from the clients' updates, and can do more: it skips clients
    whose numbers are not finite, measures the updates, and has server optimizers. All of that takes passes over the
    memory, which for large models on a fast link cost as much as the sum. Here a number that is not finite ends the
    run.

    The mean arrives in the model. A copy is kept only where a client might have to begin there after another one.
    """

    def validate(self, setting: Setting) -> None:
        raise_errors(compression_error(setting))

    def setup(
        self, model: FlatModel, optimizer: OptimizerFactory, client_weights: Sequence[float], transport: Transport
    ) -> ModelAveragingRun:
        return ModelAveragingRun(self, model, client_weights, transport)


class ModelAveragingRun(RunSession):
    """Model averaging at work on one model.

    Attributes:
        parameters: the global parameters [n], in at least float32, where `is_kept`; else they are in the model alone.
        in_model: whether the model holds the global parameters now.
    """

    def __init__(
        self, options: ModelAveraging, model: FlatModel, client_weights: Sequence[float], transport: Transport
    ):
        self.options, self.model, self.transport = options, model, transport
        self.client_weights = client_weights
        self.parameters = model.shared.to(torch.promote_types(model.shared.dtype, torch.float32), copy=True)
        self.parts = transport.chunks(len(self.parameters))
        self.moves_all = sum(part.stop - part.start for part in self.parts) == len(self.parameters)
        self.is_kept = self.in_model = True
        self.models = SummedUpdates(transport)

    def start_round(self, round: Round) -> ModelAveragingRound:
        return ModelAveragingRound(self, round)

    def load_round(self, round: Round, state: dict[str, Any]) -> ModelAveragingRound:
        self.is_kept, self.in_model = "parameters" in state, False
        if self.is_kept:
            self.parameters.copy_(pad_or_trim(state["parameters"], len(self.parameters)))
        session = ModelAveragingRound(self, round)
        session.weights = json.loads(state["json"])
        self.models.load_state_dict(state, len(self.parameters))
        return session

    def start_from_global(self, exclusive: bool) -> None:
        """Have the model hold the global parameters, which a client is about to change."""
        if not self.is_kept and not exclusive:
            self.parameters.copy_(self.model.shared)
            self.is_kept = True
        self.models.detach()
        self.reset_model()
        self.in_model = False

    def reset_model(self) -> None:
        if not self.in_model:
            self.model.shared.copy_(self.parameters)
            self.in_model = True

    def take(self, vector: Tensor) -> None:
        """Set the global parameters to the sum over the silos of their shares of the mean. A collective."""
        self.is_kept = self.parameters.dtype != self.model.shared.dtype  # the model would round the mean
        mean = self.parameters if self.is_kept else self.model.shared
        for part, total in self.transport.all_reduce_async(vector, "models"):
            if total.data_ptr() != mean[part].data_ptr():
                mean[part].copy_(total)
        self.transport.all_gather(mean)
        self.in_model = not self.is_kept

    def global_state(self) -> dict[str, Tensor]:
        return {"parameters": self.parameters if self.is_kept else self.model.shared}

    def load_global_state(self, state: dict[str, Tensor]) -> None:
        self.parameters.copy_(pad_or_trim(state["parameters"], len(self.parameters)))
        self.is_kept, self.in_model = True, False
        self.reset_model()

    def state_dict(self) -> dict[str, Any]:
        # A model of the same precision holds the same numbers; one of a lower precision has rounded them.
        return {} if self.parameters.dtype == self.model.shared.dtype else {"parameters": self.parameters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parameters.copy_(pad_or_trim(state.get("parameters", self.model.shared), len(self.parameters)))
        self.is_kept = True


class ModelAveragingRound(RoundSession, ClientSession):
    """A round, and the training of its clients."""

    def __init__(self, run: ModelAveragingRun, round: Round):
        self.run = run
        self.planned_weight = run.options.total_weight(run.client_weights[client] for client in round.cohort)
        self.weights: list[float] = []
        run.models.clear()

    def start_client(self, state: ClientState, exclusive: bool = False) -> ModelAveragingRound:
        # Without any weight nothing is combined, and the model is reset.
        self.run.start_from_global(exclusive and self.planned_weight > 0)
        return self

    def load_client(self, state: dict[str, Any]) -> ModelAveragingRound:
        return self

    def finish(self, result: ClientResult) -> tuple[float, ClientState]:
        run, local = self.run, self.run.model.shared
        weight = run.options.weight_of(result.weight)
        share = run.models.share(weight, self.planned_weight)
        self.weights.append(weight)
        # The local model is needed no more, and its share takes its place if that is precise enough.
        out = local if run.parameters.dtype == local.dtype else None
        run.models.add(torch.mul(local.to(run.parameters.dtype), share, out=out))
        return 0.0, {}

    def scalars(self) -> dict[str, float]:
        return {"weight": math.fsum(self.weights)}

    def aggregate(self, sums: dict[str, float]) -> Metrics:
        if sums["weight"]:
            self.run.take(self.run.models.reduced(self.planned_weight, sums["weight"], 1.0, self.run.parameters))
        self.run.reset_model()
        return {}

    def contribution(self) -> dict[str, Tensor]:
        return self.run.models.contribution() if self.weights else {}

    def contribution_like(self, clients: int) -> dict[str, Tensor]:
        return self.run.models.contribution_like(self.run.parameters, clients)

    def merge(self, contribution: dict[str, Tensor], weight: float, factor: float = 1.0) -> None:
        if contribution:
            self.run.models.merge(contribution, factor * self.run.models.share(weight, self.planned_weight))

    def state_dict(self) -> dict[str, Any]:
        kept = {"parameters": self.run.parameters} if self.run.is_kept else {}
        return {"json": json.dumps(self.weights), **self.run.models.state_dict(), **kept}
