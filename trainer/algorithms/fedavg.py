"""Federated averaging, and what is a choice of its slots: FedSGD, FedProx, FedAvgM, FedAdam, DiLoCo, FedBN, alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trainer.algorithms.algorithm import Figures, InnerState, MakeOptimizer
from trainer.cohort import Round
from trainer.flat import FlatModel, Moments
from trainer.optimizers import optimizer_state, restore_optimizer_state
from trainer.wires import Wire
from trainer.work import Work

Weight = Literal["examples", "equal", "capped"]

average: MakeOptimizer = partial(torch.optim.SGD, lr=1.0)


class FedAvg:
    """w <- server(w, sum_k (n_k / n) (w - w_k)): the weighted mean of the clients' deltas, as a gradient of the server.

    McMahan et al. 2017 (arXiv 1602.05629); with a server optimizer other than SGD at rate 1: Reddi et al. 2021 (arXiv
    2003.00295); with inner AdamW kept and a Nesterov server: DiLoCo, Douillard et al. 2023 (arXiv 2311.08105).

    weight            `examples`: n_k is the number of the client's training examples; `equal`: 1; `capped`: the
                      examples, but `cap` at most
    server            makes a torch optimizer, which must be elementwise, for the one vector of global parameters
    shared            a regular expression: the parameters and buffers whose names it finds travel, the others stay
                      with their client; `.*` is all, `$^` none
    inner_state       what becomes of a client's optimizer state between its rounds: `reset` or `keep`
    batch_statistics  of BatchNorm layers: `pooled` as those of all examples together, or the plain `mean`
    pull              mu of FedProx, Li et al. 2020 (arXiv 1812.06127): adds mu (w_k - w) to the clients' gradients
    norm_bound        the largest norm of a client's delta, a longer one is shortened, Sun et al. 2019 (arXiv
                      1911.07963); None: any
    """

    pools_data = False
    votes = True
    vectors = 1  # that a client contributes, each as long as the shared parameters

    def __init__(
        self,
        server: MakeOptimizer = average,
        weight: Weight = "examples",
        cap: int | None = None,
        shared: str = ".*",
        inner_state: InnerState = "reset",
        batch_statistics: Moments = "pooled",
        pull: float = 0.0,
        norm_bound: float | None = None,
    ):
        words = (("weight", weight, Weight), ("inner_state", inner_state, InnerState))
        for name, value, valid in (*words, ("batch_statistics", batch_statistics, Moments)):
            if value not in get_args(valid):
                raise ValueError(f"algorithm.{name}={value}\n  valid: {', '.join(get_args(valid))}")
        if (weight == "capped") != (cap is not None) or (cap is not None and cap < 1):
            given = "null" if cap is None else cap
            raise ValueError(
                f"algorithm.weight={weight} with algorithm.cap={given}\n"
                "  valid: weight=capped with a cap from 1, or another weight with cap=null"
            )
        if pull < 0:
            raise ValueError(f"algorithm.pull={pull}\n  valid: a number from 0")
        if norm_bound is not None and norm_bound <= 0:
            raise ValueError(f"algorithm.norm_bound={norm_bound}\n  valid: a number above 0, or null")
        self.make_server, self.weight, self.cap = server, weight, cap
        self.inner_state: InnerState = inner_state
        self.batch_statistics: Moments = batch_statistics
        self.pull, self.norm_bound = pull, norm_bound
        self.shared_pattern = re.compile(shared)
        self.has_personal = shared != ".*"

    @property
    def stateful(self) -> bool:
        return self.inner_state == "keep" or self.has_personal

    def is_shared(self, name: str) -> bool:
        return self.shared_pattern.search(name) is not None

    def refuse(self, optimizer: MakeOptimizer, clip_norm: float | None, clients: int) -> None:
        pass

    def setup(self, model: FlatModel, optimizer: MakeOptimizer, sizes: Sequence[int]) -> None:
        self.model = model
        # Combined in at least float32, whatever the model is trained in.
        precision = torch.promote_types(model.shared.dtype, torch.float32)
        self.parameters = torch.nn.Parameter(model.shared.to(precision, copy=True), requires_grad=False)
        self.sums = self.parameters.new_zeros(self.vectors * len(self.parameters))
        self.mean = self.sums[: len(self.parameters)]  # of this silo's deltas, when there are any
        self.weights: list[float] = []
        self.norms: list[float] = []
        self.model_is_global = True
        self.server = self.make_server([self.parameters])
        self.anchor = model.shared.clone() if self.pull else model.shared  # where FedProx pulls to
        self.anchors = model.views(self.anchor)

    def begin_round(self, round: Round) -> None:
        self.weights, self.norms = [], []
        self._set_anchors()

    def begin_client(self, state: dict[str, Any]) -> None:
        if not self.model_is_global:
            self._reset_model()
        self.model_is_global = False

    def correct(self) -> None:
        if self.pull:
            self.model.add_to_gradients(self.model.shared_parameters, self.pull)
            self.model.add_to_gradients(self.anchors, -self.pull)

    def contribute(self, work: Work) -> float:
        # delta = global - local: it points where a gradient points, so server optimizers need no minus sign.
        delta = torch.sub(self.parameters, self.model.shared, out=None if self.weights else self.mean)
        norm = float(torch.linalg.vector_norm(delta))
        if self.has_personal and not torch.linalg.vector_norm(self.model.personal).isfinite():
            norm = math.nan
        if math.isfinite(norm):
            bounded = norm if self.norm_bound is None else min(norm, self.norm_bound)
            if bounded < norm:
                delta.mul_(bounded / norm)
            self.weights.append(self._weight(work.examples))
            self.norms.append(bounded)
            self._add(delta, work)
        return norm

    def client_state(self) -> dict[str, Any]:
        return {}

    def header(self) -> dict[str, float]:
        pairs = list(zip(self.weights, self.norms, strict=True))
        return {
            "weight": math.fsum(self.weights),
            "weighted_norms": math.fsum(w * d for w, d in pairs),
            "squared_weighted_norms": math.fsum((w * d) ** 2 for w, d in pairs),
        }

    def combine(self, sums: dict[str, float], wire: Wire) -> Figures:
        norm = 0.0
        if sums["weight"] > 0:
            total = wire.sum(self._payload(sums))
            norm = float(torch.linalg.vector_norm(total[: len(self.parameters)]))
            self._move(total, sums)
        self._reset_model()
        return {"delta/norm": norm, "delta/cosine": mean_cosine(sums, norm)}

    def round_state(self) -> dict[str, Any]:
        contributions = {"weights": json.dumps(self.weights), "norms": json.dumps(self.norms)}
        sums = {"sums": self.sums} if self.weights else {}
        return {"parameters": self.parameters.data, **contributions, **sums}

    def load_round_state(self, state: dict[str, Any]) -> None:
        self.parameters.data.copy_(state["parameters"])
        self.weights, self.norms = json.loads(state["weights"]), json.loads(state["norms"])
        if self.weights:
            self.sums.copy_(state["sums"])
        self.model_is_global = False
        self._set_anchors()

    def state_dict(self) -> dict[str, Any]:
        # A model of the same precision holds the same numbers; one of a lower precision has rounded them.
        parameters = {} if self.parameters.dtype == self.model.shared.dtype else {"parameters": self.parameters.data}
        return {**parameters, "server": optimizer_state(self.server)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parameters.data.copy_(state.get("parameters", self.model.shared))
        restore_optimizer_state(self.server, state["server"])

    def _weight(self, examples: int) -> float:
        if self.weight == "equal":
            return 1.0
        return float(examples if self.cap is None else min(examples, self.cap))

    def _add(self, delta: Tensor, work: Work) -> None:
        """Adds a client's vectors to this silo's sums; its weight is the last of `weights`."""
        mix(self.mean, delta, self.weights)

    def _payload(self, sums: dict[str, float]) -> Tensor:
        """This silo's sums for the wire, divided by the weight of all silos."""
        if not self.weights:
            return self.sums.zero_()
        return self.sums.mul_(math.fsum(self.weights) / sums["weight"])

    @torch.no_grad()
    def _move(self, total: Tensor, sums: dict[str, float]) -> None:
        """Moves the global parameters by the payloads' total."""
        self.parameters.grad = total[: len(self.parameters)]
        self.server.step()
        self.parameters.grad = None

    def _reset_model(self) -> None:
        self.model.shared.copy_(self.parameters)
        self.model_is_global = True

    def _set_anchors(self) -> None:
        if self.pull:
            self.anchor.copy_(self.parameters)


def mean_cosine(sums: dict[str, float], norm: float) -> float:
    """The mean cosine between pairs of clients' deltas, weighted by w_i |d_i| w_j |d_j|; NaN for a single client.

    (|sum w_i d_i|^2 - sum w_i^2 |d_i|^2) / ((sum w_i |d_i|)^2 - sum w_i^2 |d_i|^2): three sums of scalars and the norm
    of the weighted mean, so no client's delta is sent anywhere.
    """
    if not sums["weight"]:
        return math.nan
    squares = sums["squared_weighted_norms"] / sums["weight"] ** 2
    pairs = (sums["weighted_norms"] / sums["weight"]) ** 2 - squares
    # A single client leaves the rounding of 0 / 0.
    return (norm**2 - squares) / pairs if pairs > 1e-9 * squares else math.nan


def mix(mean: Tensor, vector: Tensor, weights: Sequence[float]) -> None:
    """Makes the weighted mean of earlier vectors that of them and this one, whose weight is the last.

    A running mean: the sum of n_k * vector would leave float32's exact integers and float16's range. The first vector
    may be the mean itself.
    """
    if vector is not mean:
        mean.lerp_(vector, weights[-1] / math.fsum(weights))
