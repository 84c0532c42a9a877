"""Federated averaging, and what is a choice of its options: FedSGD, FedProx, FedAvgM, FedAdam, DiLoCo, FedBN, local."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainer.algorithms.aggregation_rule import AggregationRule, Mean
from trainer.algorithms.base import ClientSession, ClientState, Metrics, Setting
from trainer.algorithms.client_result import ClientResult
from trainer.algorithms.drift_correction import Corrector, DriftCorrection
from trainer.algorithms.federated import (
    FederatedOptions,
    FederatedRound,
    FederatedRun,
    compression_error,
    mean,
)
from trainer.algorithms.round import Round
from trainer.distributed.transport import Transport
from trainer.models.flat import FlatModel, difference, pad_or_trim
from trainer.optim.optimizers import OptimizerFactory
from trainer.utils.errors import raise_errors


@dataclass(frozen=True, kw_only=True)
class FedAvg(FederatedOptions):
    """w <- server(w, sum_k (n_k / n) (w - w_k)): the weighted mean of the clients' updates, as the server's gradient.

    McMahan et al. 2017 (arXiv 1602.05629); with a server optimizer other than SGD at rate 1: Reddi et al. 2021 (arXiv
    2003.00295); with inner AdamW kept and a Nesterov server: DiLoCo, Douillard et al. 2023 (arXiv 2311.08105).

    Attributes:
        server: makes the server optimizer, an elementwise torch optimizer, for the vector of global parameters.
        proximal_mu: mu of FedProx, Li et al. 2020 (arXiv 1812.06127): adds mu (w_k - w) to the clients' gradients.
        max_update_norm: the largest 2-norm of a client's update; a longer one is scaled down, Sun et al. 2019 (arXiv
            1911.07963). None: no limit.
        drift_correction: Scaffold, FedNova or FedDyn; None: plain averaging.
        rule: how the clients' updates become one: their mean, or a robust rule such as Median.
    """

    server: OptimizerFactory = mean
    proximal_mu: float = 0.0
    max_update_norm: float | None = None
    drift_correction: DriftCorrection | None = None
    rule: AggregationRule = field(default_factory=Mean)
    skips_nonfinite_clients = True

    @property
    def keeps_client_state(self) -> bool:
        corrected = self.drift_correction is not None and self.drift_correction.keeps_client_state
        return super().keeps_client_state or corrected

    @property
    def adds_to_gradients(self) -> bool:
        return self.proximal_mu > 0 or self.drift_correction is not None

    def __post_init__(self):
        super().__post_init__()
        if self.proximal_mu < 0:
            raise ValueError(f"algorithm.proximal_mu={self.proximal_mu}\n  valid: a number from 0")
        if self.max_update_norm is not None and self.max_update_norm <= 0:
            raise ValueError(f"algorithm.max_update_norm={self.max_update_norm}\n  valid: a number above 0, or null")

    def validate(self, setting: Setting) -> None:
        errors = [] if self.rule.is_sum else compression_error(setting)
        errors += self.rule.errors(self, setting)
        if self.drift_correction:
            errors += self.drift_correction.errors(self, setting)
        raise_errors(errors)

    def setup(
        self, model: FlatModel, optimizer: OptimizerFactory, client_weights: Sequence[float], transport: Transport
    ) -> FedAvgRun:
        return FedAvgRun(self, model, optimizer, client_weights, transport)


class FedAvgRun(FederatedRun):
    """FedAvg at work on one model.

    Attributes:
        options: the choices.
        optimizer: makes the optimizer of the clients.
        corrector: the drift correction at work.
    """

    def __init__(
        self,
        options: FedAvg,
        model: FlatModel,
        optimizer: OptimizerFactory,
        client_weights: Sequence[float],
        transport: Transport,
    ):
        super().__init__(options.server, model, client_weights, transport, transport.chunks(len(model.shared)))
        self.options, self.optimizer = options, optimizer
        self.updates = options.rule.setup(transport)
        self.corrector = options.drift_correction.setup(self) if options.drift_correction else Corrector()

    def start_round(self, round: Round) -> FedAvgRound:
        # Moved by what this silo's clients have done and compression has held back, or the next clients would do that
        # again: the step ahead of Xu et al. 2021 (arXiv 2008.05823).
        start = self.transport.lookahead(self.global_model.parameters, "delta")
        return FedAvgRound(self, round, start)

    def load_round(self, round: Round, state: dict[str, Any]) -> FedAvgRound:
        self.global_model.set(state["parameters"])
        length = len(self.global_model.parameters)
        start = pad_or_trim(state["start"], length) if "start" in state else self.global_model.parameters
        session = FedAvgRound(self, round, start)
        session.load_state_dict(state)
        return session

    def global_state(self) -> dict[str, Tensor]:
        return {**super().global_state(), **self.corrector.start_vectors()}

    def load_global_state(self, state: dict[str, Tensor]) -> None:
        super().load_global_state(state)
        self._load_vectors(self.corrector.start_vectors(), state)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.corrector.vectors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._load_vectors(self.corrector.vectors, state)

    @staticmethod
    def _load_vectors(vectors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        for name, vector in vectors.items():
            vector.copy_(pad_or_trim(state[name], len(vector)))


class FedAvgRound(FederatedRound):
    """A round of FedAvg.

    Attributes:
        start: the parameters [n] that the clients of this silo begin with.
        sums: what the clients of this silo have added to each vector in the corrector's `summed`, by name.
    """

    def __init__(self, run: FedAvgRun, round: Round, start: Tensor):
        super().__init__(run.options, run.client_weights, round)
        self.run, self.start = run, start
        self.measures: list[dict[str, float]] = []
        self.updates = run.updates
        self.updates.clear()
        corrector = run.corrector
        self.sums = {name: torch.zeros_like(corrector.vectors[name]) for name in corrector.summed}

    @cached_property
    def anchors(self) -> list[Tensor]:
        """Where clients begin, one tensor for each shared parameter, in the model's precision."""
        return self.run.model.views(self.start.to(self.run.model.shared.dtype))

    def start_client(self, state: ClientState, exclusive: bool = False) -> FedAvgClient:
        self.updates.detach()
        self.run.global_model.load_into_model(self.start)
        return FedAvgClient(self, state)

    def load_client(self, state: dict[str, Any]) -> FedAvgClient:
        return FedAvgClient(self, state["client"])

    def scalars(self) -> dict[str, float]:
        names = self.run.corrector.measure(ClientResult(0, 0.0))
        measured = {
            name: math.fsum(w * one[name] for w, one in zip(self.weights, self.measures, strict=True)) for name in names
        }
        return measured | super().scalars()

    def aggregate(self, sums: dict[str, float]) -> Metrics:
        run, corrector = self.run, self.run.corrector
        norm = factor = 0.0
        if sums["weight"]:
            # All vectors are under way together.
            pending = {name: run.transport.all_reduce_async(vector, name) for name, vector in self.sums.items()}
            factor = corrector.mean_factor(sums)
            chunks = self.updates.reduce(self.planned_weight, sums["weight"], factor, run.global_model.parameters)
            norm = run.global_model.move(chunks, lambda block, update: corrector.correct(block, update, sums))
            for name, arriving in pending.items():
                for part, total in arriving:
                    corrector.vectors[name][part].add_(total)
            for vector in corrector.vectors.values():
                run.transport.all_gather(vector)
        run.reset_model()
        return run.options.rule.metrics(sums, norm, factor)

    def contribution(self) -> dict[str, Tensor]:
        return {**self.updates.contribution(), **self.sums} if self.weights else {}

    def contribution_like(self, clients: int) -> dict[str, Tensor]:
        return {**self.updates.contribution_like(self.start, clients), **self.sums}

    def merge(self, contribution: dict[str, Tensor], weight: float, factor: float = 1.0) -> None:
        if not contribution:
            return
        self.updates.merge(contribution, factor * self.updates.share(weight, self.planned_weight))
        for name, vector in self.sums.items():
            vector.add_(contribution[name], alpha=factor)

    def state_dict(self) -> dict[str, Any]:
        parameters = self.run.global_model.parameters
        numbers = {"weights": self.weights, "norms": self.norms, "measures": self.measures}
        start = {} if self.start is parameters else {"start": self.start}
        updates = self.updates.state_dict()
        return {"parameters": parameters, "json": json.dumps(numbers), "sums": self.sums, **updates, **start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`, but for `parameters` and `start`."""
        numbers = json.loads(state["json"])
        self.weights, self.norms, self.measures = numbers["weights"], numbers["norms"], numbers["measures"]
        self.updates.load_state_dict(state, len(self.start))
        for name, vector in self.sums.items():
            vector.copy_(pad_or_trim(state["sums"][name], len(vector)))


class FedAvgClient(ClientSession):
    """A client's local training in a round of FedAvg.

    Attributes:
        round: the round.
        vectors: the vectors [n] that the client keeps, by name, for the drift correction.
        terms: for each a list of tensors, one for each shared parameter, and a factor: are added to the gradients.
    """

    def __init__(self, round: FedAvgRound, state: ClientState):
        self.round, run = round, round.run
        self.vectors = {
            name: pad_or_trim(state[name], len(round.start)) if name in state else torch.zeros_like(round.start)
            for name in run.corrector.client_vectors
        }
        self.terms: list[tuple[Sequence[Tensor], float]] = []
        if mu := run.options.proximal_mu:
            self.add_proximal_term(mu)
        run.corrector.start_client(self)

    def add_proximal_term(self, mu: float) -> None:
        """Add mu (w_k - w) to the gradients, where w is where the client began."""
        self.terms += [(self.round.run.model.shared_parameters, mu), (self.round.anchors, -mu)]

    def add_vector(self, vector: Tensor, factor: float = 1.0) -> None:
        """Add a vector [n] times a factor to the gradients."""
        model = self.round.run.model
        self.terms.append((model.views(vector.to(model.shared.dtype)), factor))

    def adjust_gradients(self) -> None:
        for tensors, factor in self.terms:
            self.round.run.model.add_to_gradients(tensors, factor)

    def finish(self, result: ClientResult) -> tuple[float, ClientState]:
        round, run = self.round, self.round.run
        weight = run.options.weight_of(result.weight)
        measures = run.corrector.measure(result)
        factor = run.corrector.update_factor(measures)
        share = round.updates.share(weight, round.planned_weight) * factor
        # start - local: it points where a gradient points, so server optimizers need no minus sign. The local model is
        # needed no more, and the update takes its place if that is precise enough.
        local = run.model.shared
        into = local if local.dtype == round.start.dtype else None
        update, norm = difference(round.start, local, share, into, run.transport.counted(len(local)))
        if run.options.has_personal and not torch.linalg.vector_norm(run.model.personal).isfinite():
            norm = math.nan
        norm = run.transport.norm_over_parts(norm)
        if not math.isfinite(norm):
            return norm, {}
        limit = run.options.max_update_norm
        bounded = norm if limit is None else min(norm, limit)
        if bounded < norm:
            update.mul_(bounded / norm)
        round.weights.append(weight)
        round.norms.append(bounded * factor)
        round.measures.append(measures)
        run.corrector.finish_client(self, update, share, result)
        round.updates.add(update)
        return norm, dict(self.vectors)

    def state_dict(self) -> dict[str, Any]:
        return {"client": self.vectors}
