"""The result of a client's local training: counts and sums, from which metrics are made."""

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
    """A client's work in a round. Losses and units are this replica's part; all else is equal in the silo.

    Attributes:
        client: the client.
        weight: n_k, the number of its training examples, or the sum of their weights.
        losses: loss sums of the last steps, not yet added up.
        loss_total: the sum of the losses before them.
        last_step: loss sum and units of the last step.
        examples_seen: examples that went through the model, over all epochs.
        steps: optimizer steps that were attempted, the position in the client's round.
        units: examples or tokens over which the loss is summed, each times its weight.
        lr_factors: factors on the learning rates of the steps that were applied.
        timed_out: whether the deadline passed before the client had done all its steps.
        ends_round: whether it had passed when the client ended, so that no other client begins.
        gradient_norm: of the last step, before clipping.
        learning_rate: of the last step.
        seconds_data: waiting for data.
        seconds_compute: all other time.
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
        """Count one step."""
        self.last_step = (loss_sum, units)
        self.steps += 1
        self.examples_seen += examples
        self.units += units
        self.losses.append(loss_sum)
        if len(self.losses) == MAX_PENDING_LOSSES:
            self._sum_losses()

    def last_loss(self) -> float:
        """Return this replica's mean loss of the last step. Waits for the device."""
        loss_sum, units = self.last_step
        return float(loss_sum) / (units or 1)

    @property
    def loss_sum(self) -> float:
        """The sum of the steps' losses over their units. Waits for the device."""
        if self.losses:
            self._sum_losses()
        return float(self.loss_total)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a tree; the losses as one vector, so that their sum stays the same to the last bit."""
        numbers = {
            name: float(value) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
            if name not in ("losses", "last_step")
        }
        losses = {"losses": torch.stack(self.losses)} if self.losses else {}
        return {"numbers": json.dumps(numbers), **losses}

    def _sum_losses(self) -> None:
        self.loss_total = self.loss_total + torch.stack(self.losses).double().sum()
        self.losses = []


def client_result_from_state(state: dict[str, Any]) -> ClientResult:
    """Return the ClientResult of a `state_dict`."""
    losses = list(state["losses"].unbind()) if "losses" in state else []
    return ClientResult(**json.loads(state["numbers"]), losses=losses)


def merge_client_results(results: Sequence[ClientResult], replica: int) -> ClientResult:
    """Merge the parts of another number of replicas: the first replica gets all that is summed over replicas."""
    one = results[0]
    one.loss_total = sum(result.loss_sum for result in results) if replica == 0 else 0.0
    one.units = sum(result.units for result in results) if replica == 0 else 0
    one.losses = []
    return one
