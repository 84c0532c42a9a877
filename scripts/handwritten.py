"""The loop that a good engineer writes by hand: the truth that parity tests and benchmarks compare with.

It knows nothing of the trainer. Data is resident and indexed by a permutation; there is no logging.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    permutations: Iterable[Tensor],
    batch_size: int,
) -> None:
    """Trains for one epoch a permutation, each rank on its part of every batch of `batch_size` examples."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrapped = model
    if world_size > 1:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    share = batch_size // world_size
    model.train()
    for permutation in permutations:
        for start in range(rank * share, len(permutation), batch_size):
            ids = permutation[start : start + share]
            loss = loss_function(wrapped(inputs.index_select(0, ids)), targets.index_select(0, ids))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
