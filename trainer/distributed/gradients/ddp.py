"""DistributedDataParallel over the replicas of a silo."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.gradients.base import FullPrecisionReducer, GradientReducer
from trainer.distributed.topology import Topology
from trainer.optim import LossScaler
from trainer.utils.errors import InputError
from trainer.utils.text import first_few

# torch 2.13 deprecates the older name of the option.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


def wrap_ddp(
    module: nn.Module, topology: Topology, reducer: GradientReducer, scaler: LossScaler, allow_unused: bool = False
) -> tuple[nn.Module, GradientReducer]:
    """Wrap a module so that its gradients are averaged over the silo.

    Args:
        module: on the device of the topology, with parameters and buffers that are equal on all ranks already
        topology: of this rank
        reducer: averages the gradients
        scaler: of the loss
        allow_unused: whether parameters may be left without a gradient; DDP then looks for them in every step

    Returns:
        the module to train with, and the reducer that it uses
    """
    # DDP costs half of a small step, so a silo of one replica does without.
    if topology.num_replicas == 1:
        return module, FullPrecisionReducer()
    # Each replica has its own batch statistics, which are pooled once a round. The modules are equal already.
    options: dict[str, Any] = {SYNC_BUFFERS: False, "init_sync": False, "gradient_as_bucket_view": True}
    options["find_unused_parameters"] = allow_unused
    if topology.device.type == "cuda":
        options["device_ids"] = [topology.device]
    wrapped = DistributedDataParallel(module, process_group=topology.silo_group, **options)
    reducer.attach(wrapped, topology, scaler)
    return wrapped, reducer


def raise_if_unused(error: Exception, module: nn.Module) -> None:
    """Raise InputError if `error` is DDP's, for parameters that the last batch left without a gradient; else return."""
    if "finished reduction in the prior iteration" not in str(error):
        return
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    indices = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
    names = [trainable[int(index)] for index in indices[1].split()] if indices else ["some parameters"]
    raise InputError(
        f"model={type(module).__name__}: the loss of a batch does not depend on {', '.join(first_few(names, 8))}, and "
        "the replicas of a silo wait for all gradients.\n  set allow_unused=true, which costs some time; or use them"
    ) from error


def no_sync(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a backward pass does not all-reduce: for all micro-batches of a step but the last."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()
