"""What a client did in a round: the counts and sums that figures are made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_PENDING_LOSSES = 1024  # appending a step's loss to a list costs a tenth of adding it to a tensor


@dataclass
class ClientResult:
    """What a client did in a round. losses and units are this replica's part, the rest is equal in the silo.

    weight          n_k, the number of the client's training examples, or the sum of their weights if they have any
    examples_seen   examples that went through the model, epochs counted
    steps           optimizer steps that were attempted: the place in the client's round
    units           what the loss is summed over: examples or tokens, each times its weight
    lr_factors         on the learning rates, of the steps that were applied
    gradient_norm   of the last step, before clipping
    timed_out         whether the time of the round was over before the client's work was done
    ends_round         whether it was over when the client had ended, so that no other client begins
    """

    client: int
    weight: float
    losses: list[Tensor] = field(default_factory=list)
    loss_total: Tensor | float = 0.0
    last_step: tuple[Tensor | float, float] = (0.0, 0)
    examples_seen: int = 0
    steps: int = 0
    units: float = 0
    lr_factors: list[float] = field(default_factory=list)
    timed_out: bool = False
    ends_round: bool = False
    gradient_norm: Tensor | float = 0.0
    learning_rate: float = 0.0
    seconds_data: float = 0.0
    seconds_compute: float = 0.0

    def add(self, examples: int, loss_sum: Tensor, units: float) -> None:
        """Counts one step."""
        self.last_step = (loss_sum, units)
        self.steps += 1
        self.examples_seen += examples
        self.units += units
        self.losses.append(loss_sum)
        if len(self.losses) == MAX_PENDING_LOSSES:
            self._sum_losses()

    def last_loss(self) -> float:
        """This replica's mean loss of the last step. Waits for the device."""
        loss_sum, units = self.last_step
        return float(loss_sum) / (units or 1)

    @property
    def loss_sum(self) -> float:
        """The sum of the steps' losses over their units. Waits for the device."""
        if self.losses:
            self._sum_losses()
        return float(self.loss_total)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as a tree; the losses as one vector, so that their sum stays the same to the last bit."""
        numbers = {
            name: float(value) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
            if name not in ("losses", "last")
        }
        losses = {"losses": torch.stack(self.losses)} if self.losses else {}
        return {"numbers": json.dumps(numbers), **losses}

    def _sum_losses(self) -> None:
        self.loss_total = self.loss_total + torch.stack(self.losses).double().sum()
        self.losses = []


def client_result_from_state(state: dict[str, Any]) -> ClientResult:
    """The ClientResult whose `state_dict` this is."""
    losses = list(state["losses"].unbind()) if "losses" in state else []
    return ClientResult(**json.loads(state["numbers"]), losses=losses)


def merge_client_results(results: Sequence[ClientResult], replica: int) -> ClientResult:
    """One replica's part of the same work, done by another number of replicas: the first takes all there is to sum."""
    one = results[0]
    one.loss_total = sum(work.loss_sum for work in results) if replica == 0 else 0.0
    one.units = sum(work.units for work in results) if replica == 0 else 0
    one.losses = []
    return one
