"""The module that averages its gradients over a silo."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.gradients.base import FullPrecisionReducer, GradientReducer
from trainer.distributed.topology import Topology
from trainer.optim import LossScaler

# What torch 2.13 calls the option that was broadcast_buffers before.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


def wrap_ddp(
    module: nn.Module, topology: Topology, reducer: GradientReducer, scaler: LossScaler
) -> tuple[nn.Module, GradientReducer]:
    """The module that averages its gradients over the silo, and what they are averaged by.

    A silo of one stays bare, and sends nothing: DDP costs half of a small step.
    """
    if topology.num_replicas == 1:
        return module, FullPrecisionReducer()
    # Replicas keep their batch statistics apart; they are pooled once a round.
    options: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
    if topology.device.type == "cuda":
        options["device_ids"] = [topology.device]
    wrapped = DistributedDataParallel(module, process_group=topology.silo_group, **options)
    reducer.attach(wrapped, topology, scaler)
    return wrapped, reducer


def no_sync(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Keep the gradients of a backward pass local: an earlier micro-batch of a step, whose last one is all-reduced."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()
