"""DistributedDataParallel over the replicas of a silo."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.gradients.base import FullPrecisionReducer, GradientReducer
from trainer.distributed.topology import Topology
from trainer.optim import LossScaler

# torch 2.13 deprecates the older name of the option.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


def wrap_ddp(
    module: nn.Module, topology: Topology, reducer: GradientReducer, scaler: LossScaler
) -> tuple[nn.Module, GradientReducer]:
    """Wrap a module so that its gradients are averaged over the silo.

    Args:
        module: on the device of the topology
        topology: of this rank
        reducer: averages the gradients
        scaler: of the loss

    Returns:
        the module to train with, and the reducer that it uses
    """
    # DDP costs half of a small step, so a silo of one replica does without.
    if topology.num_replicas == 1:
        return module, FullPrecisionReducer()
    # Each replica has its own batch statistics, which are pooled once a round.
    options: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
    if topology.device.type == "cuda":
        options["device_ids"] = [topology.device]
    wrapped = DistributedDataParallel(module, process_group=topology.silo_group, **options)
    reducer.attach(wrapped, topology, scaler)
    return wrapped, reducer


def no_sync(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a backward pass does not all-reduce: for all micro-batches of a step but the last."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()
