"""Streaming: one fragment of the parameters a round, under way between the silos while they keep training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from trainer.algorithms.aggregation_rule import mean_cosine
from trainer.algorithms.base import ClientOptimizerState, ClientSession, ClientState, Metrics, Setting
from trainer.algorithms.client_result import ClientResult
from trainer.algorithms.federated import FederatedOptions, FederatedRound, FederatedRun, Weighting, mean
from trainer.algorithms.round import Round
from trainer.algorithms.server_optimizer import extract_range, sorted_by_offset
from trainer.algorithms.updates import SummedUpdates
from trainer.distributed.transport import Transport
from trainer.distributed.transport.base import ReducedChunks, shift_slice
from trainer.models.flat import FlatModel, difference, pad_or_trim
from trainer.optim.optimizers import OptimizerFactory
from trainer.utils.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Streaming(FederatedOptions):
    """FedAvg and DiLoCo by fragments: round r combines fragment r mod P, and clients keep the rest of their models.

    Douillard et al. 2025 (arXiv 2501.18512). The updates of a fragment are sent at the end of a round. After
    `overlap_steps` steps of its next round a client takes in their sum: the server moves the global fragment, and the
    client's own becomes alpha local + (1 - alpha) global. A round that ends before takes it in at its end; the last
    round at once. Evaluated, and saved as the model, is the global copy. A client that has missed a round begins with
    the global parameters. A checkpoint contains what is under way, and waits for it: save rarely what must not wait.

    Attributes:
        server: makes the server optimizer, an elementwise torch optimizer, for each fragment of the global parameters.
        fragments: P, each of whole parameters, and of about equal sizes.
        overlap_steps: 0: training waits for the sum.
        alpha: weight of a client's own fragment; 0 with one fragment and no overlap is FedAvg.
    """

    weighting: Weighting = "equal"
    client_optimizer_state: ClientOptimizerState = "keep"
    server: OptimizerFactory = mean
    fragments: int = 1
    overlap_steps: int = 0
    alpha: float = 0.0
    skips_nonfinite_clients = True
    needs_one_world = True

    @property
    def keeps_client_state(self) -> bool:
        return True

    def __post_init__(self):
        super().__post_init__()
        if self.fragments < 1 or self.overlap_steps < 0 or not 0 <= self.alpha <= 1:
            raise ValueError(
                f"algorithm.fragments={self.fragments}, algorithm.overlap_steps={self.overlap_steps}, "
                f"algorithm.alpha={self.alpha:g}\n"
                "  valid: fragments from 1, overlap_steps from 0, alpha from 0 to 1"
            )

    def validate(self, setting: Setting) -> None:
        pass

    def setup(
        self, model: FlatModel, optimizer: OptimizerFactory, client_weights: Sequence[float], transport: Transport
    ) -> StreamingRun:
        return StreamingRun(self, model, client_weights, transport)


@dataclass
class InFlight:
    """The fragment that was sent last.

    Attributes:
        round: index of the round that sent it; -1 if nobody took part in the last one.
        chunks: its sums, until they are taken in.
        sums: the scalars that went with it.
        metrics: of the fragment that was taken in last.
    """

    round: int = -1
    chunks: ReducedChunks | None = None
    sums: dict[str, float] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)


class StreamingRun(FederatedRun):
    """Streaming at work on one model."""

    def __init__(self, options: Streaming, model: FlatModel, client_weights: Sequence[float], transport: Transport):
        self.options, self.transport, self.length = options, transport, len(model.shared)
        self.edges = fragment_edges(model, options.fragments)
        fragments = map(self.fragment, range(options.fragments))
        parts = [part for fragment in fragments for part in self.parts_of(fragment)]
        super().__init__(options.server, model, client_weights, transport, parts)
        self.updates = SummedUpdates(transport)
        self.in_flight = InFlight()

    def fragment(self, round: int) -> slice:
        """Return the part of the parameters that the round of this index combines."""
        first = round % self.options.fragments
        return slice(*self.edges[first : first + 2])

    def parts_of(self, fragment: slice) -> list[slice]:
        """Return the parts of a fragment that this rank moves."""
        parts = self.transport.chunks(fragment.stop - fragment.start, fragment.start)
        return [shift_slice(part, fragment.start) for part in parts]

    def start_round(self, round: Round) -> StreamingRound:
        return StreamingRound(self, round)

    def load_round(self, round: Round, state: dict[str, Any]) -> StreamingRound:
        self.global_model.set(state["parameters"])
        session = StreamingRound(self, round)
        session.load_state_dict(state)
        return session

    def receive(self) -> None:
        """Move the global fragment by the sums that are under way; waits for them."""
        sent = self.in_flight
        if sent.chunks is None:
            return
        norm = self.global_model.move(sent.chunks, fragment=self.fragment(sent.round))
        sent.chunks = None
        sent.metrics = {"norm": norm, "cosine": mean_cosine(sent.sums, norm)}

    def flush(self) -> None:
        self.receive()
        self.reset_model()

    def state_dict(self) -> dict[str, Any]:
        sent = self.in_flight
        numbers = {"sent_in": sent.round, "is_under_way": sent.chunks is not None}
        return super().state_dict() | {"streaming": numbers | {"sums": sent.sums, "delta": sent.metrics}}

    def sharded_state_dict(self) -> dict[str, Any]:
        state, sent = super().sharded_state_dict(), self.in_flight
        if sent.chunks is None:
            return state
        arrived = list(sent.chunks)
        sent.chunks = iter(arrived)
        return state | {"totals": {str(part.start): {"total": total} for part, total in arrived}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        numbers = state["streaming"]
        self.in_flight = InFlight(numbers["sent_in"], None, numbers["sums"], numbers["delta"])
        if numbers["is_under_way"]:
            saved, parts = sorted_by_offset(state["totals"]), self.parts_of(self.fragment(numbers["sent_in"]))
            self.in_flight.chunks = iter([(part, extract_range(saved, part)["total"]) for part in parts])


class StreamingRound(FederatedRound):
    """A round, which combines one fragment.

    Attributes:
        due: the fragment.
    """

    def __init__(self, run: StreamingRun, round: Round):
        super().__init__(run.options, run.client_weights, round)
        self.run, self.index, self.due = run, round.index, run.fragment(round.index)
        run.updates.clear()

    def start_client(self, state: ClientState, exclusive: bool = False) -> StreamingClient:
        run, continues = self.run, state.get("round") == self.index - 1
        if not continues:
            run.receive()
        run.updates.detach()
        run.global_model.load_into_model(run.global_model.parameters)
        if continues:
            run.model.shared.copy_(pad_or_trim(state["local"], run.length))
        return StreamingClient(self, is_merged=not continues)

    def load_client(self, state: dict[str, Any]) -> StreamingClient:
        return StreamingClient(self, state["is_merged"])

    def scalars(self) -> dict[str, float]:
        # Some transports need every silo for their last stage, and one without clients has had no step to receive in.
        self.run.receive()
        return super().scalars()

    def aggregate(self, sums: dict[str, float]) -> Metrics:
        run, sent = self.run, self.run.in_flight
        sent.round = self.index if sums["weight"] else -1
        if sums["weight"]:
            like = run.global_model.parameters[self.due]
            vector = run.updates.reduced(self.planned_weight, sums["weight"], 1.0, like)
            sent.chunks, sent.sums = run.transport.all_reduce_async(vector, "delta", self.due.start), sums
        if not run.options.overlap_steps:
            run.receive()
        run.reset_model()
        return {f"delta/{name}": sent.metrics[name] for name in ("norm", "cosine") if name in sent.metrics}

    def contribution(self) -> dict[str, Tensor]:
        return self.run.updates.contribution() if self.weights else {}

    def contribution_like(self, clients: int) -> dict[str, Tensor]:
        return self.run.updates.contribution_like(self.run.global_model.parameters[self.due], clients)

    def merge(self, contribution: dict[str, Tensor], weight: float, factor: float = 1.0) -> None:
        if contribution:
            self.run.updates.merge(contribution, factor * self.run.updates.share(weight, self.planned_weight))

    def state_dict(self) -> dict[str, Any]:
        numbers = {"weights": self.weights, "norms": self.norms, "due": self.due.start}
        updates = self.run.updates.state_dict()
        return {"parameters": self.run.global_model.parameters, "json": json.dumps(numbers), **updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`, but for `parameters`."""
        numbers = json.loads(state["json"])
        self.weights, self.norms = numbers["weights"], numbers["norms"]
        if "sum" in state:
            entry = extract_range([(numbers["due"], {"sum": state["sum"]})], self.due)
            self.run.updates.load_state_dict(entry, self.due.stop - self.due.start)


class StreamingClient(ClientSession):
    """A client's local training, into which the fragment of the last round is merged.

    Attributes:
        is_merged: whether it is.
    """

    def __init__(self, round: StreamingRound, is_merged: bool):
        self.round, self.is_merged = round, is_merged

    def before_step(self, step: int) -> None:
        if step >= self.round.run.options.overlap_steps and not self.is_merged:
            self._merge()

    def finish(self, result: ClientResult) -> tuple[float, ClientState]:
        round, run = self.round, self.round.run
        if not self.is_merged:
            self._merge()
        local = run.model.shared.clone()
        weight = run.options.weight_of(result.weight)
        share = run.updates.share(weight, round.planned_weight)
        # In memory of its own: it travels while the model trains.
        due = round.due
        counted = run.transport.counted(due.stop - due.start, due.start)
        update, norm = difference(run.global_model.parameters[due], local[due], share, counted=counted)
        if run.options.has_personal and not torch.linalg.vector_norm(run.model.personal).isfinite():
            norm = math.nan
        if not torch.linalg.vector_norm(local).isfinite():
            norm = math.nan
        norm = run.transport.norm_over_parts(norm)
        if math.isfinite(norm):
            round.weights.append(weight)
            round.norms.append(norm)
            run.updates.add(update)
        return norm, {"round": round.index, "local": local}

    def state_dict(self) -> dict[str, Any]:
        return {"is_merged": self.is_merged}

    def _merge(self) -> None:
        run = self.round.run
        run.receive()
        if run.in_flight.round >= 0:
            fragment = run.fragment(run.in_flight.round)
            local, moved = run.model.shared[fragment], run.global_model.parameters[fragment]
            local.lerp_(moved.to(local.dtype), 1 - run.options.alpha)
        self.is_merged = True


def fragment_edges(model: FlatModel, fragments: int) -> list[int]:
    """Cut the shared vector where parameters begin; return its edges, one more than there are fragments.

    The sizes are those of whole parameters, so all parts of a model are cut alike, whatever their number.

    Raises:
        InputError: there are fewer parameters than fragments.
    """
    layout = model.shared_layout
    if 0 < len(layout) < fragments:
        raise InputError(
            f"algorithm.fragments={fragments}: a fragment has one parameter or more, and the model has {len(layout)}.\n"
            f"  valid: 1 to {len(layout)}"
        )
    sizes = [0, *accumulate(math.prod(placed.box.whole) for placed in layout)]
    firsts = [0]
    for index in range(1, fragments if layout else 1):
        wanted = sizes[-1] * index / fragments
        possible = range(firsts[-1] + 1, len(layout) - (fragments - index) + 1)
        firsts.append(min(possible, key=lambda first: abs(sizes[first] - wanted)))
    starts = [layout[first].start for first in firsts] if layout else [0] * fragments
    return [*starts, len(model.shared)]
