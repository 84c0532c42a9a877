"""Make the model of a silo from a module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from trainer.distributed.gradients.base import FullPrecisionReducer, GradientReducer
from trainer.distributed.options import SiloOptions
from trainer.distributed.sharding.parallel_model import ParallelModel, ReplicatedModel
from trainer.distributed.sharding.recompute import recompute_activations
from trainer.distributed.sharding.units import find_units
from trainer.distributed.topology import Topology
from trainer.utils.errors import InputError
from trainer.utils.text import first_few

MAX_NAMED = 5  # tensors in an error


def validate_plan(module: nn.Module, topology: Topology) -> None:
    """Raise InputError, a ValueError, if a module has no plan by which the ranks could divide its layers."""
    if topology.dims.tensor > 1:
        from trainer.distributed.sharding.tensor_parallel import plan_of  # its import takes a second

        plan_of(module, topology.dims.tensor)


def initial_device(topology: Topology) -> AbstractContextManager[object]:
    """Return a context in which the initial module is made: without memory, where another rank has the values."""
    return torch.device("meta") if topology.num_parts > 1 and topology.rank else nullcontext()


def is_without_values(module: nn.Module) -> bool:
    """Return whether another rank has the initial values of a module."""
    return any(parameter.is_meta for parameter in module.parameters())


def validate_initial(module: nn.Module) -> None:
    """Raise InputError if a module keeps tensors that are neither parameters nor buffers, and so have no values."""
    stray = [
        f"{name}.{attribute}" if name else attribute
        for name, layer in module.named_modules()
        for attribute, value in vars(layer).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
    if stray:
        raise InputError(
            f"model={type(module).__name__} keeps {', '.join(first_few(stray, MAX_NAMED))}, which are neither "
            "parameters nor buffers. With silo.shard they would have no values on other ranks.\n"
            "  register them: self.register_buffer(NAME, tensor, persistent=False)"
        )


def parallelize(
    module: nn.Module,
    topology: Topology,
    options: SiloOptions,
    make_reducer: Callable[[], GradientReducer] = FullPrecisionReducer,
) -> ParallelModel:
    """Return a module as the ranks of a silo hold it: each whole, or each a part of it.

    Args:
        module: with the same names and shapes on all ranks; see `initial_device`.
        topology: of this rank.
        options: of the silo.
        make_reducer: makes what averages the gradients.
    """
    if options.recompute:
        recompute_activations(find_units(module, options.units))
    if topology.num_parts == 1:
        return ReplicatedModel(module.to(topology.device), topology)
    from trainer.distributed.sharding.fsdp import ShardedModel  # its import takes a second

    return ShardedModel(module, topology, options, make_reducer().reduce_dtype)


def can_pass_alone() -> bool:
    """Return whether `ParallelModel.alone` works with this torch, where ranks hold parts of a model."""
    from torch.distributed.fsdp import FSDPModule  # its import takes a second

    return hasattr(FSDPModule, "reset_iter_state")  # not in torch 2.11


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor of which ranks of the silo may hold parts; a collective of theirs if they do."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
