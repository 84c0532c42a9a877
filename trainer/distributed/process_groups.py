"""The process groups inside the silos. Every rank makes every group, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from trainer.distributed.parallel_dims import ParallelDims

AXES = ("dp_replicate", "dp_shard", "tp")  # of a silo's ranks, as torchtitan names them

Groups = dict[tuple[int, ...], dist.ProcessGroup | None]  # by their ranks; None where this rank is no member


def open_silo_groups(silos: Sequence[range], dims: ParallelDims, timeout: timedelta) -> Groups:
    """Make the groups of all silos: each silo, and the lines of its grid. A collective over the world.

    Args:
        silos: the ranks of each silo
        dims: how each divides the model
        timeout: of their collectives
    """
    wanted = [tuple(ranks) for ranks in silos]
    if dims.num_parts > 1:
        for grid in (_grid(ranks, dims) for ranks in silos):
            by_part = grid.flatten(1)
            lines = [*by_part, *by_part.T, *(line for axis in range(grid.ndim) for line in _lines(grid, axis))]
            wanted += [tuple(line.tolist()) for line in lines if len(line) > 1]
    groups = {ranks: new_group(ranks, timeout) for ranks in dict.fromkeys(wanted)}
    if dims.shard == 1 and dims.tensor > 1:
        # FSDP2 wants an axis of shards. All ranks would wait for each of its groups of one, as many as there are ranks.
        own = (dist.get_rank(),)
        groups[own] = new_group(own, timeout, local=True)
    return groups


def open_mesh(ranks: range, rank: int, dims: ParallelDims, groups: Groups, device: torch.device) -> DeviceMesh:
    """Return the mesh of a silo, with an axis for each way in which its ranks are divided. No collective.

    Args:
        ranks: of the silo
        rank: one of them
        dims: how they divide the model
        groups: those of `open_silo_groups`, of which the mesh consists
        device: of this rank
    """
    grid = _grid(ranks, dims)
    # Gradients are averaged along the first two, which FSDP2 takes together.
    axes = [axis for axis, size in enumerate(grid.shape) if size > 1 or AXES[axis] == "dp_shard"]
    own = [next(tuple(line.tolist()) for line in _lines(grid, axis) if rank in line) for axis in axes]
    members = [group for group in (groups[line] for line in own) if group is not None]
    names = tuple(AXES[axis] for axis in axes)
    # A mesh of torch's own making would open the groups a second time.
    return DeviceMesh.from_group(
        members, device.type, grid.view([grid.shape[axis] for axis in axes]), mesh_dim_names=names
    )


def new_group(
    ranks: Sequence[int], timeout: timedelta | None = None, backend: str | None = None, local: bool = False
) -> dist.ProcessGroup | None:
    """Make a group; return it, or None if this rank is no member. A collective: over the world, or its members."""
    group = dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=local)
    return group if isinstance(group, dist.ProcessGroup) else None


def _grid(ranks: range, dims: ParallelDims) -> Tensor:
    """Return the ranks of a silo as a grid of the AXES."""
    return torch.tensor(ranks).view(-1, dims.shard, dims.tensor)


def _lines(grid: Tensor, axis: int) -> Tensor:
    """Return the lines of a grid along one of its axes, a row each."""
    return grid.movedim(axis, -1).reshape(-1, grid.shape[axis])
