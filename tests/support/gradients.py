"""A module with given gradients, which a reducer averages over a silo."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.checkpoint.format import Shard, find_saved, write_shard
from trainer.distributed.gradients import GradientReducer
from trainer.distributed.topology import Topology, distributed

SHAPES = [(24, 10), (7,), (12, 3, 4), (30, 16), (16,)]
SMALL_BUCKETS_MB = 0.001

Given = Sequence[Sequence[Tensor]]  # by step, by parameter


@dataclass
class Loss:
    """The part of a LossScaler that reducers use."""

    loss_scale: float = 1.0
    may_skip: bool = False


class Decreed(nn.Module):
    """Parameters whose gradients are the input tensors."""

    def __init__(self):
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in SHAPES)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        # The last parameter is used first, so that DDP rebuilds its buckets after the first step.
        pairs = list(zip(self.all, gradients, strict=True))
        return torch.stack([(parameter * gradient).sum() for parameter, gradient in pairs]).sum()


class Silo:
    """A replica's module in DDP, whose gradients the reducer averages in several buckets."""

    def __init__(self, reducer: GradientReducer, topology: Topology, loss: Loss | None = None):
        self.gradients, self.loss = copy.deepcopy(reducer), loss or Loss()
        self.module = Decreed()
        options: dict[str, Any] = {"bucket_cap_mb": SMALL_BUCKETS_MB, "gradient_as_bucket_view": True}
        self.ddp = DistributedDataParallel(self.module, process_group=topology.silo_group, **options)
        self.gradients.attach(self.ddp, topology, self.loss)

    def step(self, given: Sequence[Tensor]) -> Tensor:
        """Return the mean over the replicas, as one vector."""
        self.ddp(given).backward()
        mean = torch.cat([parameter.grad.flatten() for parameter in self.module.all])
        self.module.zero_grad()
        return mean

    def saved(self, path: Path, name: str) -> dict[str, Any]:
        """Write the state to disk, and return it as read."""
        write_shard(path, Shard(name, (name,), "0"), {"own": self.gradients.state_dict()})
        return read(path, name)

    def residuals(self) -> Tensor:
        """Return the residuals as one vector in the parameters' order; those of `errors` from the third step on."""
        state, sizes = self.gradients.state_dict(), [parameter.numel() for parameter in self.module.all]
        parts = [torch.zeros(size) for size in sizes]
        for name, residual in state.get("residuals", {}).items():
            parts[int(name.removeprefix("all."))] = residual
        for bucket, error in state.get("errors", {}).items():
            members = self._buckets()[int(bucket)]
            for member, part in zip(members, error.split([sizes[member] for member in members]), strict=True):
                parts[member] = part
        return torch.cat([part.flatten() for part in parts])

    def _buckets(self) -> list[list[int]]:
        """Return the indices of the parameters in each bucket."""
        listed = self.ddp._get_ddp_logging_data()["rebuilt_per_bucket_param_indices"]
        return [list(map(int, bucket.split())) for bucket in str(listed).split(", ")]


def read(path: Path, name: str) -> dict[str, Any]:
    saved = find_saved(path)
    assert saved
    return saved.load_shard(name, "own")


def decreed(replica: int, steps: int, spread: float = 1.0) -> Given:
    """Return random gradients of a replica: a common part, and a separate one, of very different magnitudes."""
    own, common = (torch.Generator().manual_seed(seed) for seed in (100 + replica, 7))

    def draw(shape: tuple[int, ...]) -> Tensor:
        sizes = torch.rand(shape, generator=common).mul(-6).exp2()
        return sizes * (torch.randn(shape, generator=common) + spread * torch.randn(shape, generator=own))

    return [[draw(shape) for shape in SHAPES] for _ in range(steps)]


def flat(given: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in given])


def in_silo(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with the topology of one silo of all ranks."""
    with distributed(1) as topology:
        return function(topology, *arguments)
