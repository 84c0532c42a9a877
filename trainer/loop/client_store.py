"""State of clients between their rounds: personal parameters, and states of algorithm, optimizer and reducer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.gradients import GradientReducer
from trainer.distributed.topology import Topology
from trainer.models.flat import FlatModel

# Of a client's state, what each replica keeps by itself: the gradients that compression has held back.
RANK_STATE = "own"


class ClientStore:
    """The states of the clients at home in this silo.

    Attributes:
        states: by client: `personal` parameters and buffers, `algorithm`, `optimizer`, `scaler`, and `own`, which is
            this replica's alone; all else is equal on the silo's replicas.
        initial_personal_state: the personal parameters and buffers of a client that has none yet.
        next_initial_personal_state: the same from the next round on in which a client trains for the first time.
    """

    def __init__(self, initial_personal_state: dict[str, Tensor]):
        self.states: dict[int, dict[str, Any]] = {}
        self.initial_personal_state = self.next_initial_personal_state = initial_personal_state

    def get(self, client: int) -> dict[str, Any]:
        """Return the live state of a client; empty before its first round."""
        return self.states.get(client, {})

    def personal(self, client: int) -> dict[str, Tensor]:
        """Return the live personal parameters and buffers of a client."""
        return self.get(client).get("personal", self.initial_personal_state)

    def average_personal(self, model: FlatModel, weights: Sequence[float], topology: Topology) -> dict[str, Tensor]:
        """Return the mean personal parameters and statistics of all clients that have trained. A collective.

        Statistics are pooled as those between silos are; other buffers are those of a client that has not trained.

        Args:
            model: the model.
            weights: n_k by client.
            topology: the ranks.
        """
        statistics, own = model.personal_statistics, model.personal_state()
        lengths = [1, len(model.personal), len(statistics.vector())]
        sums = torch.zeros(sum(lengths), dtype=torch.float64)
        counts = torch.zeros_like(statistics.counts())
        for client, state in self.states.items():
            model.load_personal_state(state["personal"])
            one = torch.cat([torch.ones(1).double(), model.personal.double().cpu(), statistics.vector()])
            sums.add_(one, alpha=weights[client])
            counts = torch.maximum(counts, statistics.counts())
        weight, parameters, moments = collectives.all_reduce_between_silos(sums, topology).split(lengths)
        if len(counts):
            collectives.all_reduce_max(counts)
        average = self.initial_personal_state
        if weight:
            model.load_personal_state(average)
            model.personal.copy_(parameters / weight)
            statistics.load(moments / weight, counts)
            average = model.personal_state()
        model.load_personal_state(own)
        return average

    def state_dict(self, without: int | None = None) -> dict[str, Any]:
        """Return the states by client, equal on all replicas of the silo.

        Args:
            without: a client to leave out.
        """
        return {
            str(client): {name: part for name, part in state.items() if name != RANK_STATE}
            for client, state in self.states.items()
            if client != without
        }

    def rank_state_dict(self, without: int | None = None) -> dict[str, Any]:
        """Return this replica's own part of the states, by client."""
        return {
            str(client): state[RANK_STATE]
            for client, state in self.states.items()
            if client != without and state.get(RANK_STATE)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.states = {int(client): kept for client, kept in state.items()}

    def load_rank_state_dicts(self, states: Sequence[Mapping[str, Any]], reducer: GradientReducer) -> None:
        """Restore the `rank_state_dict` of this replica, or of all replicas if their number has changed."""
        for client, kept in self.states.items():
            if saved := [state[str(client)] for state in states if str(client) in state]:
                kept[RANK_STATE] = reducer.reshard(saved)
