"""The updates of a silo's clients in a round: their sum, or a row for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.distributed.transport import Transport
from trainer.distributed.transport.base import ReducedChunks
from trainer.models.flat import pad_or_trim


class Updates(Protocol):
    """The updates of this silo's clients in a round."""

    def clear(self) -> None:
        """Begin a round."""
        ...

    def detach(self) -> None:
        """Let go of the model's memory, which the last update may lie in."""
        ...

    def share(self, weight: float, planned_weight: float) -> float:
        """Return what the update of a client is multiplied by before it is added."""
        ...

    def add(self, update: Tensor) -> None:
        """Add a client's update."""
        ...

    def reduce(self, planned_weight: float, weight: float, factor: float, like: Tensor) -> ReducedChunks:
        """Combine the updates of all silos, times a factor; parts of the result as they come in. A collective.

        Args:
            planned_weight: the weight of all clients of the round.
            weight: the weight of the clients that took part, over all silos.
            factor: multiplies the result.
            like: a vector of the result's length, dtype and device.
        """
        ...

    def contribution(self) -> dict[str, Tensor]:
        """Return what this silo has, of one client or more, by name."""
        ...

    def contribution_like(self, like: Tensor, clients: int) -> dict[str, Tensor]:
        """Return tensors of the names, dtypes and shapes of a `contribution`; see `RoundSession.contribution_like`.

        Args:
            like: a vector of the length and dtype of an update.
            clients: whose updates the contribution has.
        """
        ...

    def merge(self, contribution: dict[str, Tensor], factor: float) -> None:
        """Add the `contribution` of another silo, times a factor."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the live state of the middle of a round."""
        ...

    def load_state_dict(self, state: dict[str, Any], length: int) -> None:
        """Restore a `state_dict`, for vectors of this length."""
        ...


class SummedUpdates:
    """Updates as one sum, of shares of the weight that the round was planned with.

    The last update stays where it is, which may be the model's own memory, until `detach`. A silo with one client thus
    sends its update from where it was made. Memory for sums is kept between rounds.
    """

    def __init__(self, transport: Transport):
        self.transport = transport
        self.last: Tensor | None = None
        self.total: Tensor | None = None
        self.has_total = False

    def clear(self) -> None:
        self.last, self.has_total = None, False

    def detach(self) -> None:
        if self.last is None:
            return
        if self.total is None or len(self.total) != len(self.last):
            self.total = torch.empty_like(self.last)
        if self.has_total:
            self.total.add_(self.last)
        else:
            self.total.copy_(self.last)
        self.last, self.has_total = None, True

    def share(self, weight: float, planned_weight: float) -> float:
        return weight / (planned_weight or 1.0)

    def add(self, update: Tensor) -> None:
        self.detach()
        self.last = update

    def reduce(self, planned_weight: float, weight: float, factor: float, like: Tensor) -> ReducedChunks:
        return self.transport.all_reduce_async(self.reduced(planned_weight, weight, factor, like), "delta")

    def reduced(self, planned_weight: float, weight: float, factor: float, like: Tensor) -> Tensor:
        """Return this silo's part of the mean over all silos, times a factor."""
        vector = self._sum()
        if vector is None:
            vector = torch.zeros_like(like)
        elif weight != planned_weight:
            vector.mul_(planned_weight / weight)
        if factor != 1.0:
            vector.mul_(factor)
        return vector

    def contribution(self) -> dict[str, Tensor]:
        vector = self._sum()
        assert vector is not None
        return {"delta": vector}

    def contribution_like(self, like: Tensor, clients: int) -> dict[str, Tensor]:
        return {"delta": like}

    def merge(self, contribution: dict[str, Tensor], factor: float) -> None:
        delta = contribution["delta"]
        self.add(delta if factor == 1.0 else delta * factor)
        self.detach()  # the memory is the contribution's

    def state_dict(self) -> dict[str, Any]:
        self.detach()
        return {"sum": self.total} if self.has_total else {}

    def load_state_dict(self, state: dict[str, Any], length: int) -> None:
        if "sum" in state:
            self.last, self.total, self.has_total = None, pad_or_trim(state["sum"], length), True

    def _sum(self) -> Tensor | None:
        """Return the sum in place, for the caller to change; None if nothing was added."""
        if self.has_total:
            self.detach()
        return self.total if self.has_total else self.last


class StackedUpdates:
    """Updates as rows, one a client, which a robust rule combines. No rank ever holds the rows of all silos whole."""

    def __init__(self, transport: Transport, rule: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]):
        self.transport, self.rule = transport, rule
        self.rows: list[Tensor] = []

    def clear(self) -> None:
        self.rows = []

    def detach(self) -> None:
        pass

    def share(self, weight: float, planned_weight: float) -> float:
        return 1.0

    def add(self, update: Tensor) -> None:
        self.rows.append(update.clone())

    def reduce(self, planned_weight: float, weight: float, factor: float, like: Tensor) -> ReducedChunks:
        combined = self.transport.all_reduce_columns(self._stacked(like), self.rule)
        self.clear()
        return ((part, combined[part]) for part in self.transport.chunks(len(combined)))

    def contribution(self) -> dict[str, Tensor]:
        return {"rows": torch.stack(self.rows)}

    def contribution_like(self, like: Tensor, clients: int) -> dict[str, Tensor]:
        return {"rows": like.expand(clients, -1)}

    def merge(self, contribution: dict[str, Tensor], factor: float) -> None:
        self.rows += contribution["rows"].unbind()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": {str(place): row for place, row in enumerate(self.rows)}}

    def load_state_dict(self, state: dict[str, Any], length: int) -> None:
        rows = state["rows"]
        self.rows = [pad_or_trim(rows[str(place)], length) for place in range(len(rows))]

    def _stacked(self, like: Tensor) -> Tensor:
        return torch.stack(self.rows) if self.rows else like.new_zeros(0, len(like))
