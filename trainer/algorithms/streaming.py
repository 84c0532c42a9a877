"""Streaming: a fragment of the parameters at a time, under way between the silos while they go on training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainer.algorithms.base import Figures, InnerState, MakeOptimizer
from trainer.algorithms.client_result import Work
from trainer.algorithms.fedavg import FedAvg, Weight, average, mean_cosine
from trainer.algorithms.round import Round
from trainer.algorithms.server_optimizer import cut, in_order
from trainer.distributed.transport.base import Arrivals, shifted
from trainer.models.flat import Moments, difference, resized


class Streaming(FedAvg):
    """FedAvg and DiLoCo by fragments: round r combines fragment r mod P, and clients keep the rest of their models.

    Douillard et al. 2025 (arXiv 2501.18512). The deltas of a fragment are sent at the end of a round. A client has done
    `overlap_steps` of its next round when their total is taken in: the server moves the global fragment, and the
    client's own becomes alpha local + (1 - alpha) global. A round that ends before takes it in at its end; the last
    round at once. What is evaluated, and saved as the model, is the global copy.

    fragments      P, of equal lengths
    overlap_steps  0: training waits for the total
    alpha          how much a client's own fragment counts; 0 with one fragment and no overlap is FedAvg

    The other slots are those of FedAvg. A client that has missed a round begins with the global parameters. A
    checkpoint has in it what is under way, and waits for it: save rarely what must not wait.
    """

    def __init__(
        self,
        server: MakeOptimizer = average,
        weight: Weight = "equal",
        cap: int | None = None,
        shared: str = ".*",
        inner_state: InnerState = "keep",
        batch_statistics: Moments = "pooled",
        fragments: int = 1,
        overlap_steps: int = 0,
        alpha: float = 0.0,
    ):
        super().__init__(server, weight, cap, shared, inner_state, batch_statistics)
        if fragments < 1 or overlap_steps < 0 or not 0 <= alpha <= 1:
            raise ValueError(
                f"algorithm.fragments={fragments}, algorithm.overlap_steps={overlap_steps}, algorithm.alpha={alpha:g}\n"
                "  valid: fragments from 1, overlap_steps from 0, alpha from 0 to 1"
            )
        self.num_fragments, self.overlap_steps, self.alpha = fragments, overlap_steps, alpha
        self.round = -1
        self.sent_in = -1  # the round whose totals were sent for; -1 when nobody came to the last one
        self.arrivals: Arrivals | None = None  # its totals, until they are taken in
        self.sums_sent: dict[str, float] = {}  # the header that they went with
        self.delta: Figures = {}  # what is told of the last totals that were taken in
        self.is_merged = True  # the fragment into the model of the client that trains

    @property
    def stateful(self) -> bool:
        return True

    def begin_round(self, round: Round) -> None:
        super().begin_round(round)
        self._set_round(round.index)

    def begin_client(self, state: dict[str, Any], alone: bool = False) -> None:
        goes_on = state.get("round") == self.round - 1
        if not goes_on:
            self._take_in()
        super().begin_client(state, alone)
        self.is_merged = not goes_on
        if goes_on:
            self.model.shared.copy_(resized(state["local"], len(self.model.shared)))

    def receive(self, steps: int) -> None:
        if steps >= self.overlap_steps and not self.is_merged:
            self._merge()

    def contribute(self, work: Work) -> float:
        self.receive(self.overlap_steps)
        self.local = self.model.shared.clone()
        if not torch.linalg.vector_norm(self.local).isfinite():
            return math.nan
        return super().contribute(work)

    def client_state(self) -> dict[str, Any]:
        return {"round": self.round, "local": self.local}

    def header(self) -> dict[str, float]:
        # Some wires need every silo for their last stage, and a silo without clients has had no step to take it in.
        self._take_in()
        return super().header()

    def combine(self, sums: dict[str, float]) -> Figures:
        self.sent_in = self.round if sums["weight"] else -1
        if sums["weight"]:
            self.arrivals, self.sums_sent = self.wire.start(self._payload(sums), "delta", self.due.start), sums
        if not self.overlap_steps:
            self._take_in()
        self._reset_model()
        return {f"delta/{name}": self.delta[name] for name in ("norm", "cosine") if name in self.delta}

    def settle(self) -> None:
        self._take_in()
        self._reset_model()

    def round_state(self) -> dict[str, Any]:
        told = {"round": self.round, "is_merged": self.is_merged, "start": self.due.start}
        return super().round_state() | {"streaming": told}

    def load_round_state(self, state: dict[str, Any]) -> None:
        told = state["streaming"]
        self._set_round(told["round"])
        self.is_merged = told["is_merged"]
        if "sums" in state:
            state = state | cut([(told["start"], {"sums": state["sums"]})], self.due)
        super().load_round_state(state)

    def state_dict(self) -> dict[str, Any]:
        told = {"sent_in": self.sent_in, "is_under_way": self.arrivals is not None}
        return super().state_dict() | {"streaming": told | {"sums": self.sums_sent, "delta": self.delta}}

    def slice_state(self) -> dict[str, Any]:
        if self.arrivals is None:
            return super().slice_state()
        arrived = list(self.arrivals)
        self.arrivals = iter(arrived)
        return super().slice_state() | {"totals": {str(part.start): {"total": total} for part, total in arrived}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        told = state["streaming"]
        self.sent_in, self.sums_sent, self.delta = told["sent_in"], told["sums"], told["delta"]
        if told["is_under_way"]:
            saved, own = in_order(state["totals"]), self._parts_of(self._fragment(self.sent_in))
            self.arrivals = iter([(part, cut(saved, part)["total"]) for part in own])

    def _set_round(self, index: int) -> None:
        self.round, self.due = index, self._fragment(index)

    def _fragment(self, index: int) -> slice:
        """What of the parameters the round of this index combines."""
        unit = self.wire.unit
        width = -(-len(self.parameters) // (self.num_fragments * unit)) * unit
        start = min(index % self.num_fragments * width, len(self.parameters))
        return slice(start, min(start + width, len(self.parameters)))

    def _start(self) -> Tensor:
        return self.parameters

    def _parts(self) -> list[slice]:
        fragments = map(self._fragment, range(self.num_fragments))
        return [part for fragment in fragments for part in self._parts_of(fragment)] or [slice(0, 0)]

    def _parts_of(self, fragment: slice) -> list[slice]:
        parts = self.wire.parts(fragment.stop - fragment.start)
        return [shifted(part, fragment.start) for part in parts if part.stop > part.start]

    def _delta(self, share: float) -> tuple[Tensor, float]:
        # In memory of its own: it travels while the model trains.
        return difference(self.parameters[self.due], self.model.shared[self.due], share)

    def _take_in(self) -> None:
        """Moves the global fragment by the totals that were under way; waits for them."""
        if self.arrivals is None:
            return
        norm = self._move(self.arrivals)
        self.arrivals, self.model_is_global = None, False
        self.delta = {"norm": norm, "cosine": mean_cosine(self.sums_sent, norm)}

    def _has_moved(self, block: slice) -> None:
        pass  # clients take the global fragment in, each in its own time

    def _have_all_moved(self) -> None:
        self.wire.join(self.parameters[self._fragment(self.sent_in)])

    def _merge(self) -> None:
        self._take_in()
        if self.sent_in >= 0:
            fragment = self._fragment(self.sent_in)
            mine, world = self.model.shared[fragment], self.parameters[fragment]
            mine.lerp_(world.to(mine.dtype), 1 - self.alpha)
        self.is_merged = True
