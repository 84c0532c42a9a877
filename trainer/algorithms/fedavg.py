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

from trainer.algorithms.base import Figures, InnerState, MakeOptimizer
from trainer.algorithms.client_result import Work
from trainer.algorithms.round import Round
from trainer.algorithms.server_optimizer import Server
from trainer.distributed.transport import Wire
from trainer.distributed.transport.base import Arrivals, shifted
from trainer.models.flat import FlatModel, Moments, blocks_of, difference, resized
from trainer.optim import Clip

Weight = Literal["examples", "equal", "capped"]

average: MakeOptimizer = partial(torch.optim.SGD, lr=1.0)


class FedAvg:
    """w <- server(w, sum_k (n_k / n) (w - w_k)): the weighted mean of the clients' deltas, as a gradient of the server.

    McMahan et al. 2017 (arXiv 1602.05629); with a server optimizer other than SGD at rate 1: Reddi et al. 2021 (arXiv
    2003.00295); with inner AdamW kept and a Nesterov server: DiLoCo, Douillard et al. 2023 (arXiv 2311.08105).

    weight            `examples`: n_k is the number of the client's training examples, or the sum of their weights;
                      `equal`: 1; `capped`: the examples, but `cap` at most
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
    sums_deltas = True
    votes = True
    overlap_steps = 0

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

    def refuse(self, optimizer: MakeOptimizer, clip: Clip, clients: int) -> None:
        pass

    def setup(self, model: FlatModel, optimizer: MakeOptimizer, client_weights: Sequence[float], wire: Wire) -> None:
        self.model, self.client_weights, self.wire = model, client_weights, wire
        # Combined in at least float32, whatever the model is trained in.
        precision = torch.promote_types(model.shared.dtype, torch.float32)
        self.parameters = model.shared.to(precision, copy=True)
        self.start = self.parameters  # where this silo's clients begin
        self.weights: list[float] = []
        self.norms: list[float] = []
        self.planned_weight = 0.0  # of all clients of the round
        # This silo's sum of shares of deltas: of the last client, which may lie in the model, and of those before.
        self.last: Tensor | None = None
        self.sums: Tensor | None = None
        self.has_sums = False
        self.model_is_global = True
        self.due = slice(0, len(self.parameters))  # what is combined at the end of the round
        self.parts = self._parts()
        self.moves_all = sum(part.stop - part.start for part in self.parts) == len(self.parameters)
        self.server = Server(self.make_server, self.parameters, self.parts)
        self.anchor = model.shared.clone() if self.pull else model.shared  # where FedProx pulls to: the start
        self.anchors = model.views(self.anchor)

    def begin_round(self, round: Round) -> None:
        self.weights, self.norms = [], []
        self.last, self.has_sums = None, False
        self.planned_weight = math.fsum(self._weight(self.client_weights[client]) for client in round.cohort)
        self.start = self._start()
        self._set_anchors()

    def begin_client(self, state: dict[str, Any], alone: bool = False) -> None:
        self._put_aside()
        if self.start is self.parameters:
            self._reset_model()
        else:
            self.model.shared.copy_(self.start)
        self.model_is_global = False

    def receive(self, steps: int) -> None:
        pass

    def correct(self) -> None:
        if self.pull:
            self.model.add_to_gradients(self.model.shared_parameters, self.pull)
            self.model.add_to_gradients(self.anchors, -self.pull)

    def contribute(self, work: Work) -> float:
        delta, norm = self._delta(self._share(work))
        if self.has_personal and not torch.linalg.vector_norm(self.model.personal).isfinite():
            norm = math.nan
        if math.isfinite(norm):
            bounded = norm if self.norm_bound is None else min(norm, self.norm_bound)
            if bounded < norm:
                delta.mul_(bounded / norm)
            self.weights.append(self._weight(work.weight))
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

    def combine(self, sums: dict[str, float]) -> Figures:
        norm = self._move(self.wire.start(self._payload(sums), "delta")) if sums["weight"] else 0.0
        self._reset_model()
        return {"delta/norm": norm, "delta/cosine": mean_cosine(sums, norm)}

    def settle(self) -> None:
        pass

    def round_state(self) -> dict[str, Any]:
        self._put_aside()
        told = {"weights": self.weights, "norms": self.norms, "planned_weight": self.planned_weight}
        sums = {"sums": self.sums} if self.has_sums else {}
        start = {} if self.start is self.parameters else {"start": self.start}
        return {"parameters": self.parameters, "json": json.dumps(told), **sums, **start}

    def load_round_state(self, state: dict[str, Any]) -> None:
        self.parameters.copy_(resized(state["parameters"], len(self.parameters)))
        self.start = resized(state["start"], len(self.parameters)) if "start" in state else self.parameters
        told = json.loads(state["json"])
        self.weights, self.norms, self.planned_weight = told["weights"], told["norms"], told["planned_weight"]
        self.last, self.has_sums = None, "sums" in state
        if self.has_sums:
            self.sums = resized(state["sums"], len(self.parameters[self.due]))
        self.model_is_global = False
        self._set_anchors()

    def state_dict(self) -> dict[str, Any]:
        # A model of the same precision holds the same numbers; one of a lower precision has rounded them.
        return {} if self.parameters.dtype == self.model.shared.dtype else {"parameters": self.parameters}

    def slice_state(self) -> dict[str, Any]:
        return {"server": self.server.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parameters.copy_(resized(state.get("parameters", self.model.shared), len(self.parameters)))
        self.server.load_state_dict(state["server"])

    def _weight(self, own: float) -> float:
        """What a client whose examples weigh so much counts in the combination."""
        if self.weight == "equal":
            return 1.0
        return float(own if self.cap is None else min(own, self.cap))

    def _parts(self) -> list[slice]:
        return self.wire.parts(len(self.parameters))

    def _start(self) -> Tensor:
        """The global parameters, moved by what this silo's clients have done and could not send yet.

        Else the next ones would do that again: the step ahead of Xu et al. 2021 (arXiv 2008.05823).
        """
        return self.wire.ahead(self.parameters, "delta")

    def _delta(self, share: float) -> tuple[Tensor, float]:
        """What the client has changed, times its share, and the norm of the change.

        start - local: it points where a gradient points, so server optimizers need no minus sign. The local model is
        needed no more, and the delta takes its place if that is precise enough.
        """
        mine, start = self.model.shared[self.due], self.start[self.due]
        return difference(start, mine, share, out=mine if mine.dtype == start.dtype else None)

    def _share(self, work: Work) -> float:
        """What a client's delta is multiplied by: its part of the weight that the round was planned with."""
        return self._weight(work.weight) / (self.planned_weight or 1.0)

    def _add(self, delta: Tensor, work: Work) -> None:
        """Adds a client's delta, times its share, to this silo's sum."""
        self._put_aside()
        self.last = delta

    def _put_aside(self) -> None:
        """Adds the last delta to those before it, because the model in whose place it may be is needed."""
        if self.last is None:
            return
        if self.sums is None or len(self.sums) != len(self.last):
            self.sums = torch.empty_like(self.last)
        if self.has_sums:
            self.sums.add_(self.last)
        else:
            self.sums.copy_(self.last)
        self.last, self.has_sums = None, True

    def _payload(self, sums: dict[str, float]) -> Tensor:
        """This silo's sum for the wire, as shares of the weight of those who came."""
        if self.has_sums:
            self._put_aside()
        vector = self.sums if self.has_sums else self.last
        if vector is None:
            return torch.zeros_like(self.parameters[self.due])
        return vector if sums["weight"] == self.planned_weight else vector.mul_(self.planned_weight / sums["weight"])

    def _move(self, arrivals: Arrivals) -> float:
        """Moves the global parameters by totals that come in, on all ranks of the silo; the norm of all of them."""
        squares = 0.0
        for part, total in arrivals:
            for block in blocks_of(self.parameters, part):
                come = total[shifted(block, -part.start)]
                squares += float(torch.linalg.vector_norm(come)) ** 2
                self.server.step(block, come)
                self._has_moved(block)
        self._have_all_moved()
        return math.sqrt(self.wire.add_up(squares))

    def _has_moved(self, block: slice) -> None:
        self.model.shared[block].copy_(self.parameters[block])  # while it is in the cache

    def _have_all_moved(self) -> None:
        self.wire.join(self.parameters)
        self.model_is_global = self.moves_all

    def _reset_model(self) -> None:
        if self.model_is_global:
            return
        self.model.shared.copy_(self.parameters)
        self.model_is_global = True

    def _set_anchors(self) -> None:
        if self.pull:
            self.anchor.copy_(self.start)


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
