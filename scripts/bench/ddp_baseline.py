"""The hand-written DistributedDataParallel loops that parity tests and benchmarks compare with.

They use nothing of the trainer. The data is in memory and indexed by a permutation; there is no logging.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def wrap(model: nn.Module) -> nn.Module:
    """Return the model, wrapped in DistributedDataParallel if there are several ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def steps(
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    batches: Iterable[Tensor],
) -> None:
    """Train one step on each of these batches of ids, which are this rank's parts."""
    wrapped.train()
    for ids in batches:
        loss = loss_function(wrapped(inputs.index_select(0, ids)), targets.index_select(0, ids))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def shares(permutation: Tensor, batch_size: int) -> list[Tensor]:
    """Return this rank's consecutive part of every batch of an epoch in this order."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return [batch.tensor_split(world_size)[rank] for batch in permutation.split(batch_size)]
