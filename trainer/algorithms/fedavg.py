"""Federated averaging, and what is a choice of its slots: FedSGD, FedAvgM, FedAdam, DiLoCo, training alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trainer.algorithms.algorithm import InnerState
from trainer.cohort import Round
from trainer.flat import FlatModel
from trainer.optimizers import optimizer_state, restore_optimizer_state

ServerOptimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]

Weight = Literal["examples", "equal"]

average: ServerOptimizer = partial(torch.optim.SGD, lr=1.0)


class FedAvg:
    """w <- server(w, sum_k (n_k / n) (w - w_k)): the weighted mean of the clients' deltas, as a gradient of the server.

    McMahan et al. 2017 (arXiv 1602.05629); with a server optimizer other than SGD at rate 1: Reddi et al. 2021 (arXiv
    2003.00295); with inner AdamW kept and a Nesterov server: DiLoCo, Douillard et al. 2023 (arXiv 2311.08105).

    weight       `examples`: n_k is the number of the client's training examples; `equal`: 1
    server       makes a torch optimizer, which must be elementwise, for the one vector of global parameters
    shared       a regular expression: the parameters and buffers whose names it finds travel, the others stay with
                 their client; `.*` is all, `$^` none
    inner_state  what becomes of a client's optimizer state between its rounds: `reset` or `keep`
    """

    pools_data = False
    votes = True

    def __init__(
        self,
        server: ServerOptimizer = average,
        weight: Weight = "examples",
        shared: str = ".*",
        inner_state: InnerState = "reset",
    ):
        for name, value, valid in (("weight", weight, Weight), ("inner_state", inner_state, InnerState)):
            if value not in get_args(valid):
                raise ValueError(f"algorithm.{name}={value}\n  valid: {', '.join(get_args(valid))}")
        self.make_server, self.weight = server, weight
        self.inner_state: InnerState = inner_state
        self.shared_pattern = re.compile(shared)
        self.has_personal = shared != ".*"

    @property
    def stateful(self) -> bool:
        return self.inner_state == "keep" or self.has_personal

    def is_shared(self, name: str) -> bool:
        return self.shared_pattern.search(name) is not None

    def setup(self, model: FlatModel) -> None:
        self.model = model
        # Combined in at least float32, whatever the model is trained in.
        precision = torch.promote_types(model.shared.dtype, torch.float32)
        self.parameters = torch.nn.Parameter(model.shared.to(precision, copy=True), requires_grad=False)
        self.mean = torch.zeros_like(self.parameters)  # of this silo's deltas, when there are any
        self.weights: list[float] = []
        self.norms: list[float] = []
        self.model_is_global = True
        self.server = self.make_server([self.parameters])

    def begin_round(self, round: Round) -> None:
        self.weights, self.norms = [], []

    def begin_client(self, client: int) -> None:
        if not self.model_is_global:
            self._reset_model()
        self.model_is_global = False

    def correct(self) -> None:
        pass

    def contribute(self, client: int, examples: int) -> float:
        # delta = global - local: it points where a gradient points, so server optimizers need no minus sign.
        delta = torch.sub(self.parameters, self.model.shared, out=None if self.weights else self.mean)
        norm = float(torch.linalg.vector_norm(delta))
        if self.has_personal and not torch.linalg.vector_norm(self.model.personal).isfinite():
            norm = math.nan
        if math.isfinite(norm):
            self.weights.append(float(examples) if self.weight == "examples" else 1.0)
            self.norms.append(norm)
            # A running mean: the sum of n_k * delta would leave float32's exact integers and float16's range.
            if delta is not self.mean:
                self.mean.lerp_(delta, self.weights[-1] / math.fsum(self.weights))
        return norm

    def header(self) -> dict[str, float]:
        pairs = list(zip(self.weights, self.norms, strict=True))
        return {
            "weight": math.fsum(self.weights),
            "weighted_norms": math.fsum(w * d for w, d in pairs),
            "squared_weighted_norms": math.fsum((w * d) ** 2 for w, d in pairs),
        }

    def payload(self, weight: float) -> Tensor:
        if not self.weights:
            return self.mean.zero_()
        return self.mean.mul_(math.fsum(self.weights) / weight)

    @torch.no_grad()
    def apply(self, total: Tensor) -> None:
        self.parameters.grad = total
        self.server.step()
        self.parameters.grad = None
        self._reset_model()

    def skip(self) -> None:
        self._reset_model()

    def round_state(self) -> dict[str, Any]:
        sums = {"weights": json.dumps(self.weights), "norms": json.dumps(self.norms)}
        return {"parameters": self.parameters.data, **sums, **({"mean": self.mean} if self.weights else {})}

    def load_round_state(self, state: dict[str, Any]) -> None:
        self.parameters.data.copy_(state["parameters"])
        self.weights, self.norms = json.loads(state["weights"]), json.loads(state["norms"])
        if self.weights:
            self.mean.copy_(state["mean"])
        self.model_is_global = False

    def state_dict(self) -> dict[str, Any]:
        # A model of the same precision holds the same numbers; one of a lower precision has rounded them.
        parameters = {} if self.parameters.dtype == self.model.shared.dtype else {"parameters": self.parameters.data}
        return {**parameters, "server": optimizer_state(self.server)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parameters.data.copy_(state.get("parameters", self.model.shared))
        restore_optimizer_state(self.server, state["server"])

    def _reset_model(self) -> None:
        self.model.shared.copy_(self.parameters)
        self.model_is_global = True
