"""A model in parts, by FSDP2. The only file that knows private names of `torch.distributed.fsdp`.

FSDP2 keeps a rank's part of each parameter in memory of its own, padded so that all ranks have as much. Here that
memory is a stretch of the FlatModel's vector. So what is written into the vector is in the next forward pass, and
optimizers and algorithms see plain tensors. After the first backward pass it is checked that FSDP2 still works on that
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.distributed import collectives
from trainer.distributed.gradients.base import GradientReducer
from trainer.distributed.options import SiloOptions
from trainer.distributed.sharding.tensor_parallel import apply_tensor_parallel, cut_dimension
from trainer.distributed.sharding.units import find_units
from trainer.distributed.topology import Topology
from trainer.models.boxes import Box
from trainer.optim import LossScaler


class ShardedModel:
    """A module whose parameters are divided over ranks of the silo, along their first dimension.

    With tensor parallelism its layers are divided before, and each rank's cut of a parameter is what is divided here.

    Units are gathered for their forward and their backward pass, one after the other. Gradients are averaged over the
    silo by a reduce-scatter of each unit, in every backward pass.

    Args:
        module: whole on rank 0, which gives the initial values, and on the meta device elsewhere. Its tensors are
            replaced, and have no values before `broadcast`.
        topology: of this rank.
        options: of the silo.
        reduce_dtype: of the gradients that are sent; None: their own.

    Raises:
        InputError: see `apply_tensor_parallel`.
    """

    forwards_together = True

    def __init__(
        self,
        module: nn.Module,
        topology: Topology,
        options: SiloOptions,
        reduce_dtype: torch.dtype | None = None,
    ):
        self.module, self.topology = module, topology
        self._initial = _take_tensors(module) if topology.rank == 0 else {}
        assert topology.mesh is not None and topology.mesh.mesh_dim_names is not None
        if topology.dims.tensor > 1:
            apply_tensor_parallel(module, topology.mesh["tp"])
        cuts = {name: cut_dimension(parameter) for name, parameter in module.named_parameters()}
        mesh = topology.mesh[tuple(axis for axis in topology.mesh.mesh_dim_names if axis != "tp")]
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        for unit in (*find_units(module, options.units), module):
            fully_shard(unit, mesh=mesh, reshard_after_forward=not options.keep_gathered, mp_policy=policy)
        for part in (part for group in _groups(module) for part in group.fsdp_params):
            self._leave_meta(part)
        self._parts = {id(part.sharded_param): part for group in _groups(module) for part in group.fsdp_params}
        self._cuts = {id(parameter): cuts[name] for name, parameter in module.named_parameters()}
        self._bound: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._is_checked = False
        _empty_buffers(module, topology.device)
        # A pass without gradients is not followed by a backward pass, which would free what it has gathered.
        module.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self._reshard())

    def _leave_meta(self, part: Any) -> None:
        """Give a frozen parameter memory, and a trainable one a place that takes none until it is bound."""
        old, device = part.sharded_param, self.topology.device
        sizes = part.padded_sharded_param_size
        if old.requires_grad:
            padded = torch.empty(1, dtype=old.dtype, device=device).expand(sizes)
        else:
            padded = torch.zeros(sizes, dtype=old.dtype, device=device)
            part._sharded_param_data = padded.view(-1)
        local = padded[: part.sharded_size[0]]
        part.sharded_param = nn.Parameter(part.to_sharded_dtensor(local), requires_grad=old.requires_grad)
        part._setattr_on_modules(part.sharded_param)

    def box(self, parameter: nn.Parameter) -> Box:
        return self._box(parameter, self.topology.part)

    def _box(self, parameter: nn.Parameter, part: int) -> Box:
        """Return the region of a parameter that is in a part of the model."""
        shard, tensor = divmod(part, self.topology.dims.tensor)
        whole, cut = tuple(parameter.shape), self._cuts[id(parameter)]
        first, size = [0] * len(whole), list(whole)  # of the cut of this tensor rank
        if cut is not None:
            size[cut] //= self.topology.dims.tensor
            first[cut] = size[cut] * tensor
        rows = int(self._parts[id(parameter)].padded_sharded_param_size[0])
        begin = min(rows * shard, size[0])
        first[0] += begin
        return Box(tuple(first), (min(rows, size[0] - begin), *size[1:]), whole)

    def is_repeated(self, parameter: nn.Parameter) -> bool:
        return self.topology.dims.tensor > 1 and self._cuts[id(parameter)] is None

    def room(self, parameter: nn.Parameter) -> int:
        return self._parts[id(parameter)].padded_sharded_param_size.numel()

    def local(self, tensor: Tensor) -> Tensor:
        return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()

    @torch.no_grad()
    def bind(self, parameter: nn.Parameter, memory: Tensor) -> nn.Parameter:
        assert isinstance(parameter, DTensor)
        part, local = self._parts[id(parameter)], self.local(parameter)
        view = memory[: local.numel()].view_as(local)
        part._sharded_param_data, parameter._local_tensor = memory, view
        bound = nn.Parameter(view)
        self._bound.append((parameter, bound))
        return bound

    @torch.no_grad()
    def broadcast(self, is_sent: Callable[[nn.Parameter], bool]) -> None:
        for name, parameter in self.module.named_parameters():  # all of them: other ranks have no values
            memory = self._parts[id(parameter)]._sharded_param_data
            collectives.scatter_parts(memory, self._pieces(name, parameter, memory), self.topology)
        for name, buffer in self.module.named_buffers():
            if name in self._initial:
                buffer.copy_(self._initial[name])
            collectives.broadcast(buffer)
        self._initial = {}

    def _pieces(self, name: str, parameter: nn.Parameter, like: Tensor) -> list[Tensor]:
        """Return what each part of the model has of an initial parameter, padded, on the rank that has the values."""
        if name not in self._initial:
            return []
        pieces = []
        for part in range(self.topology.num_parts):
            values = self._initial[name][self._box(parameter, part).slices]
            pieces.append(torch.zeros_like(like))
            pieces[-1][: values.numel()].view(values.shape).copy_(values)
        return pieces

    def wrap(
        self, reducer: GradientReducer, scaler: LossScaler, allow_unused: bool
    ) -> tuple[nn.Module, GradientReducer]:
        return self.module, reducer

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()  # whole gradients of all units would have to be kept until the last micro-batch

    @contextmanager
    def alone(self) -> Iterator[None]:
        groups = list(_groups(self.module))
        before = [(group._all_gather_comm, group._reduce_scatter_comm, group.all_reduce_grads) for group in groups]
        for group in groups:
            group._all_gather_comm, group._reduce_scatter_comm = _Silence(), _Silence()
            group.all_reduce_grads = False
        try:
            yield
        finally:  # of memory there may have been too little, anywhere in a pass
            root: Any = self.module
            root.reset_iter_state()
            for group, (gather, scatter, reduces) in zip(groups, before, strict=True):
                group._all_gather_comm, group._reduce_scatter_comm, group.all_reduce_grads = gather, scatter, reduces
                group._partial_reduce_output = None
            for parameter, _ in self._bound:
                parameter.grad = None

    def take_gradients(self) -> None:
        if not self._is_checked:
            self._check_memory()
        for parameter, bound in self._bound:
            bound.grad = None if parameter.grad is None else self.local(parameter.grad)
            parameter.grad = None

    def _check_memory(self) -> None:
        """Raise RuntimeError if FSDP2 has moved a part out of the vector in which it was bound."""
        for parameter, bound in self._bound:
            places = {self._parts[id(parameter)]._sharded_param_data.data_ptr(), self.local(parameter).data_ptr()}
            if bound.numel() and places != {bound.data_ptr()}:
                raise RuntimeError(
                    f"torch {torch.__version__} keeps the parts of parameters elsewhere than silotrain expects"
                )
        self._is_checked = True

    def _reshard(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class _Silence:
    """A collective that leaves its output empty."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *_: Any, **__: Any) -> None:
        output_tensor.zero_()


def _take_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name, and leave it without their memory."""
    taken = {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    empty: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None and id(parameter) not in empty:
                values = torch.empty_like(parameter, device="meta")
                empty[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
            if parameter is not None:
                layer._parameters[name] = empty[id(parameter)]
    _empty_buffers(module, torch.device("meta"))
    return taken


def _empty_buffers(module: nn.Module, device: torch.device) -> None:
    """Replace the buffers of a module by others on a device, without values; one that has several names keeps them."""
    empty: dict[int, Tensor] = {}
    for layer in module.modules():
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                if id(buffer) not in empty:
                    empty[id(buffer)] = torch.empty_like(buffer, device=device)
                layer._buffers[name] = empty[id(buffer)]


def _groups(module: nn.Module) -> Iterator[Any]:
    """Yield FSDP2's groups of parameters, one a unit."""
    for layer in module.modules():
        if isinstance(layer, FSDPModule):
            state: Any = layer._get_fsdp_state()
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            yield from filter(None, groups)
