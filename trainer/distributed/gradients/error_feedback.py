"""Error feedback: what was not sent in a step is added to what is given in the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]

from trainer.optim import LossScaler


class ErrorFeedback:
    """What this replica was given and has not sent; Seide et al. 2014, Karimireddy et al. 2019 (arXiv 1901.09847).

    One vector for each of DDP's buckets, filled up with zeros to a `multiple`. DDP orders its buckets anew after the
    first step, and a run that was loaded begins with the old order: so residuals belong to parameters, by name.

    They are of gradients under loss scaling, so they follow the scale; where steps may be left out, those before the
    step are kept beside them.
    """

    def __init__(self, module: nn.Module, scaler: LossScaler, multiple: int):
        self.scaler, self.multiple = scaler, multiple
        self.names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
        self.load_state_dict({})

    def compensate(self, bucket: GradBucket) -> Tensor:
        """The sum of both for a bucket: what is to be sent. It is the new residual when what was sent is taken off."""
        self._rescale()
        index, gradients = bucket.index(), bucket.buffer()
        before = self._vector(index, [self.names[id(parameter)] for parameter in bucket.parameters()], gradients)
        total = before
        if self.scaler.may_skip:
            total = self.previous[index] if index in self.previous else torch.empty_like(before)
            self.previous[index] = before
        torch.add(before[: len(gradients)], gradients, out=total[: len(gradients)])
        total[len(gradients) :] = 0
        self.vectors[index] = total
        return total

    def rollback(self) -> None:
        """Takes the last step back. Called at most once after it."""
        for index, before in self.previous.items():
            self.vectors[index], self.previous[index] = before, self.vectors[index]

    def state_dict(self) -> dict[str, Any]:
        """The residuals by parameter, as vectors, and the loss scale that they are under."""
        return {"residuals": self._by_parameter(), "loss_scale": self.loss_scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a `state_dict` back; an empty one is that of a replica that owes nothing."""
        self.vectors: dict[int, Tensor] = {}
        self.previous: dict[int, Tensor] = {}
        self.layout: dict[int, list[str]] = {}  # the parameters in each bucket
        self.unassigned: dict[str, Tensor] = dict(state.get("residuals", {}))  # for the bucket of their parameter
        self.loss_scale: float = state.get("loss_scale", self.scaler.loss_scale)

    def _vector(self, index: int, names: list[str], like: Tensor) -> Tensor:
        """The residuals of these parameters, one after the other."""
        if self.layout.get(index) == names:
            return self.vectors[index]
        if index in self.layout:
            self._dissolve_buckets(index)
        vector = like.new_zeros(-(-len(like) // self.multiple) * self.multiple)
        for name, part in zip(names, vector[: len(like)].split([self.sizes[name] for name in names]), strict=True):
            if name in self.unassigned:
                part.copy_(self.unassigned.pop(name))
        self.layout[index] = names
        return vector

    def _dissolve_buckets(self, first: int) -> None:
        """Lets the parameters of this bucket, and of those after it, wait for the buckets that they are in now."""
        self.unassigned = self._by_parameter()
        for index in [index for index in self.layout if index >= first]:
            del self.layout[index], self.vectors[index]
            self.previous.pop(index, None)
        for name in (name for names in self.layout.values() for name in names):
            del self.unassigned[name]

    def _by_parameter(self) -> dict[str, Tensor]:
        found = dict(self.unassigned)
        for index, names in self.layout.items():
            sizes = [self.sizes[name] for name in names]
            found |= zip(names, self.vectors[index][: sum(sizes)].split(sizes), strict=True)
        return found

    def _rescale(self) -> None:
        factor = self.scaler.loss_scale / self.loss_scale
        if factor != 1:  # a power of two: nothing is rounded
            self.unassigned = {name: residual * factor for name, residual in self.unassigned.items()}
            for vector in self.vectors.values():
                vector.mul_(factor)
            self.loss_scale = self.scaler.loss_scale


def average_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of each of other replicas, of any number, that owe of the mean what those of these states owed.

    A gradient is a mean over the replicas: what it lacks is the mean of their residuals.
    """
    names = states[0]["residuals"]
    scale = states[0]["loss_scale"]
    residuals = {name: torch.stack([state["residuals"][name] for state in states]).mean(0) for name in names}
    return {"residuals": residuals, "loss_scale": scale}
