"""Robust combinations: a few clients that send anything at all cannot carry the model where they want."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trainer.algorithms.base import Figures, InnerState, MakeOptimizer
from trainer.algorithms.client_result import Work
from trainer.algorithms.fedavg import FedAvg, average
from trainer.algorithms.round import Round
from trainer.distributed.transport import Wire
from trainer.models.flat import FlatModel, Moments, resized
from trainer.optim import Clip

Rule = Literal["median", "trimmed_mean", "krum"]


class Robust(FedAvg):
    """w <- server(w, rule of all clients' deltas w - w_k), coordinate by coordinate, all clients weighing the same.

    rule       `median`, `trimmed_mean`: Yin et al. 2018 (arXiv 1803.01498); `krum`: Blanchard et al. 2017 (NeurIPS)
    trim       of trimmed_mean: the part of the values left out at each end, from 0 below 1/2
    byzantine  of krum: how many clients may send anything; it holds for cohorts of 2 byzantine + 3 clients or more
    selected   of krum: the mean of so many of the best deltas is taken

    The other slots are those of FedAvg. Parameters are guarded, BatchNorm's statistics are not: they are pooled over
    all clients. No rank ever holds all clients' models: each silo combines its part of the coordinates of all. A silo
    keeps the deltas of all its clients until the end of the round.
    """

    sums_deltas = False

    def __init__(
        self,
        rule: Rule,
        trim: float = 0.1,
        byzantine: int = 1,
        selected: int = 1,
        server: MakeOptimizer = average,
        shared: str = ".*",
        inner_state: InnerState = "reset",
        batch_statistics: Moments = "pooled",
        pull: float = 0.0,
        norm_bound: float | None = None,
    ):
        super().__init__(server, "equal", None, shared, inner_state, batch_statistics, pull, norm_bound)
        if rule not in get_args(Rule):
            raise ValueError(f"algorithm.rule={rule}\n  valid: {', '.join(get_args(Rule))}")
        if not 0 <= trim < 0.5 or byzantine < 0 or selected < 1:
            raise ValueError(
                f"algorithm.trim={trim}, algorithm.byzantine={byzantine}, algorithm.selected={selected}\n"
                "  valid: trim from 0 below 0.5, byzantine from 0, selected from 1"
            )
        self.fewest = 2 * byzantine + 3 if rule == "krum" else 1
        self.rule: Callable[..., Tensor] = {
            "median": lambda columns, add_up: trimmed_mean(columns, 0.5),
            "trimmed_mean": lambda columns, add_up: trimmed_mean(columns, trim),
            "krum": lambda columns, add_up: krum(columns, add_up, byzantine, selected),
        }[rule]

    def refuse(self, optimizer: MakeOptimizer, clip: Clip, clients: int) -> None:
        if clients < self.fewest:
            raise ValueError(
                f"algorithm.byzantine={(self.fewest - 3) // 2} with {clients} clients a round: krum holds for "
                f"{self.fewest} or more.\n  set a smaller algorithm.byzantine, or more clients, or a larger cohort.size"
            )

    def setup(self, model: FlatModel, optimizer: MakeOptimizer, client_weights: Sequence[float], wire: Wire) -> None:
        super().setup(model, optimizer, client_weights, wire)
        self.deltas: list[Tensor] = []  # of this silo's clients

    def begin_round(self, round: Round) -> None:
        super().begin_round(round)
        self.deltas = []

    def combine(self, sums: dict[str, float]) -> Figures:
        norm = 0.0
        if sums["weight"] > 0:
            rows = torch.stack(self.deltas) if self.deltas else self.parameters.new_zeros(0, len(self.parameters))
            total = self.wire.by_columns(rows, self.rule)
            norm = self._move((part, total[part]) for part in self.wire.parts(len(total)))
        self.deltas = []
        self._reset_model()
        return {"delta/norm": norm}

    def round_state(self) -> dict[str, Any]:
        return super().round_state() | {"deltas": {str(place): delta for place, delta in enumerate(self.deltas)}}

    def load_round_state(self, state: dict[str, Any]) -> None:
        super().load_round_state(state)
        deltas = [state["deltas"][str(place)] for place in range(len(self.weights))]
        self.deltas = [resized(delta, len(self.parameters)) for delta in deltas]

    def _share(self, work: Work) -> float:
        return 1.0

    def _add(self, delta: Tensor, work: Work) -> None:
        self.deltas.append(delta.clone())


def trimmed_mean(rows: Tensor, trim: float) -> Tensor:
    """The mean of each column of rows [K, n] without the floor(trim K) least and greatest values; trim 0.5: the median.

    The median of an even number of values is the mean of the two in the middle.
    """
    clients = len(rows)
    left_out = min(int(trim * clients + 1e-9), (clients - 1) // 2)  # 0.29 of 100 is 29
    return rows.sort(0).values[left_out : clients - left_out].mean(0)


def krum(rows: Tensor, add_up: Callable[[Tensor], Tensor], byzantine: int, selected: int) -> Tensor:
    """The mean of the `selected` rows of all that are closest to their nearest K - byzantine - 2 others.

    How close is the sum of the squared distances. `rows` [K, n] are a part of the columns; `add_up` sums a tensor over
    all parts, in place.
    """
    clients = len(rows)
    distances = add_up(torch.stack([(rows - row).double().square().sum(1) for row in rows]))
    # The first of a row's sorted distances is that to itself.
    nearest = distances.sort(1).values[:, 1 : max(clients - byzantine - 1, 2)]
    best = nearest.sum(1).argsort(stable=True)[:selected]
    return rows[best].mean(0)
