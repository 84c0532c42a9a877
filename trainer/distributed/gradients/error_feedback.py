"""Error feedback: the part of the gradients that was not sent is added to those of the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]

from trainer.optim import LossScaler


class ErrorFeedback:
    """The residuals of a replica; Seide et al. 2014, Karimireddy et al. 2019 (arXiv 1901.09847).

    There is one vector for each of DDP's buckets, padded with zeros to a multiple of `multiple`. DDP rebuilds its
    buckets after the first step, and a resumed run starts with the first buckets again. The state therefore has the
    residuals by parameter name.

    Residuals are of scaled gradients, so they are rescaled with the loss. If the scaler may skip steps, the residuals
    before the step are kept for `rollback`.

    Args:
        module: the parameters
        scaler: of the loss
        multiple: of the length of the vectors
    """

    def __init__(self, module: nn.Module, scaler: LossScaler, multiple: int):
        self.scaler, self.multiple = scaler, multiple
        self.names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
        self.load_state_dict({})

    def compensate(self, bucket: GradBucket) -> Tensor:
        """Return gradients + residual of a bucket, padded.

        It is the live residual of the bucket as soon as the caller has subtracted from it what is sent.
        """
        self._rescale()
        index, gradients = bucket.index(), bucket.buffer()
        residual = self._vector(index, [self.names[id(parameter)] for parameter in bucket.parameters()], gradients)
        total = residual
        if self.scaler.may_skip:
            # The memory of the step before the last is reused.
            total = self.previous[index] if index in self.previous else torch.empty_like(residual)
            self.previous[index] = residual
        torch.add(residual[: len(gradients)], gradients, out=total[: len(gradients)])
        total[len(gradients) :] = 0
        self.vectors[index] = total
        return total

    def rollback(self) -> None:
        """Restore the residuals before the last step. Called at most once after each."""
        for index, residual in self.previous.items():
            self.vectors[index], self.previous[index] = residual, self.vectors[index]

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals by parameter, as vectors, and their loss scale."""
        return {"residuals": self._by_parameter(), "loss_scale": self.loss_scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`; an empty one resets the residuals to zero."""
        self.vectors: dict[int, Tensor] = {}
        self.previous: dict[int, Tensor] = {}
        self.layout: dict[int, list[str]] = {}  # the parameters of each bucket
        self.unassigned: dict[str, Tensor] = dict(state.get("residuals", {}))  # until their bucket is known
        self.loss_scale: float = state.get("loss_scale", self.scaler.loss_scale)

    def _vector(self, index: int, names: list[str], like: Tensor) -> Tensor:
        """Return the residuals of a bucket with these parameters; zeros at first."""
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
        """Unassign the residuals of this bucket and of those after it, because DDP has rebuilt its buckets."""
        self.unassigned = self._by_parameter()
        for index in [index for index in self.layout if index >= first]:
            del self.layout[index], self.vectors[index]
            self.previous.pop(index, None)
        for name in (name for names in self.layout.values() for name in names):
            del self.unassigned[name]

    def _by_parameter(self) -> dict[str, Tensor]:
        residuals = dict(self.unassigned)
        for index, names in self.layout.items():
            sizes = [self.sizes[name] for name in names]
            residuals |= zip(names, self.vectors[index][: sum(sizes)].split(sizes), strict=True)
        return residuals

    def _rescale(self) -> None:
        factor = self.scaler.loss_scale / self.loss_scale
        if factor != 1:  # a power of two: nothing is rounded
            self.unassigned = {name: residual * factor for name, residual in self.unassigned.items()}
            for vector in self.vectors.values():
                vector.mul_(factor)
            self.loss_scale = self.scaler.loss_scale


def average_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the state of each replica in a silo of another size.

    The mean over the replicas lacks the mean of their residuals. It lacks as much if each of any number of replicas
    has that mean as its residual.
    """
    names = states[0]["residuals"]
    scale = states[0]["loss_scale"]
    residuals = {name: torch.stack([state["residuals"][name] for state in states]).mean(0) for name in names}
    return {"residuals": residuals, "loss_scale": scale}
