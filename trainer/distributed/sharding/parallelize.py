"""Make the model of a silo from a module."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.distributed.options import SiloOptions
from trainer.distributed.sharding.parallel_model import ParallelModel, ReplicatedModel
from trainer.distributed.topology import Topology


def validate_plan(module: nn.Module, topology: Topology) -> None:
    """Raise InputError, a ValueError, if a module has no plan by which the ranks could divide its layers."""
    if topology.dims.tensor > 1:
        from trainer.distributed.sharding.tensor_parallel import plan_of  # its import takes a second

        plan_of(module, topology.dims.tensor)


def parallelize(module: nn.Module, topology: Topology, options: SiloOptions) -> ParallelModel:
    """Return a module as the ranks of a silo hold it: each whole, or each a part of it.

    Args:
        module: on the device of the topology, with the same names and shapes on all ranks.
        topology: of this rank.
        options: of the silo.
    """
    if topology.num_parts == 1:
        return ReplicatedModel(module, topology)
    from trainer.distributed.sharding.fsdp import ShardedModel  # its import takes a second

    return ShardedModel(module, topology, options)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor of which ranks of the silo may hold parts; a collective of theirs if they do."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
