"""A model whose trainable parameters are views into two flat vectors, one shared between silos and one personal.

Copying, subtracting or sending a whole model is then one operation on one vector. The parameters stay views: they are
written with `copy_` and never rebound after DistributedDataParallel has wrapped the module. Where a rank holds a part
of the model, the vectors are that part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from trainer.models.boxes import PlacedBox
from trainer.models.buffers import (
    BatchNormReduction,
    BufferStatistics,
    empty_buffers,
    load_buffers,
    materialize_buffers,
    select_all,
)
from trainer.models.storage import ParameterStorage, WholeStorage
from trainer.utils.text import first_few

ALIGNMENT_BYTES = 64  # each parameter starts on a cache line, as separately allocated tensors do

WHOLE = WholeStorage()

NAMES_SHOWN = 4  # parameters of each type in a message

BLOCK = 1 << 19  # elements; a block stays in the CPU cache while several operations pass over it


def blocks_of(vector: Tensor, part: slice) -> list[slice]:
    """Split a part of the vector into blocks, at least one."""
    # One block on a GPU: launching many kernels costs more than the cache misses.
    length = BLOCK if vector.device.type == "cpu" else max(part.stop - part.start, 1)
    return [slice(start, min(start + length, part.stop)) for start in range(part.start, part.stop, length)] or [part]


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, which are of one dtype, so that one vector can hold them.

    Raises:
        ValueError: there are none, or they are of several dtypes, or not of real numbers.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    by_type: dict[torch.dtype, list[str]] = {}
    for name, parameter in trainable.items():
        by_type.setdefault(parameter.dtype, []).append(name)
    if len(by_type) == 1 and next(iter(by_type)).is_floating_point:
        return trainable
    shown = [
        f"{dtype} ({', '.join(first_few(names, NAMES_SHOWN))})" for dtype, names in sorted(by_type.items(), key=str)
    ]
    if len(by_type) > 1:
        found, way_out = (
            f"trainable parameters of several types: {', '.join(shown)}",
            "convert them, such as by .float()",
        )
    elif by_type:
        found, way_out = f"trainable parameters of {shown[0]}", "train torch.view_as_real(parameter) in its place"
    else:
        found, way_out = "no trainable parameter", "set requires_grad=True"
    raise ValueError(f"model= has {found}.\n  valid: trainable parameters of one floating point type; {way_out}")


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the live frozen parameters by all their names; tied ones have several."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter.detach() for name, parameter in named if not parameter.requires_grad}


class FlatModel:
    """A module whose trainable parameters are views into the vectors `shared` and `personal`.

    Statistics of normalization layers are kept beside them, see BufferStatistics. Frozen parameters and all other
    buffers are neither trained nor sent: those that are personal stay with their client, the others with the rank.
    Frozen parameters are made again with the module, so they are not part of its state either.

    Args:
        module: its parameters are bound, once, to the vectors.
        is_shared: whether the parameter or buffer of a name is combined between silos. The others stay with their
            client.
        moments: how the running statistics of BatchNorm are combined, see BufferStatistics.
        alignment: the length of `shared` is a multiple of it.
        storage: of the parameters.

    Attributes:
        boxes: the region of each trainable parameter that this rank holds, by name.
        names: the name in `boxes` of each trainable parameter, by all its names; tied ones have several.
        shared_layout: the boxes in `shared`.
        personal_layout: the boxes in `personal`.
        named_trainable: the trainable parameters with their names, as views of this rank's regions.
        repeated: the stretch of `shared` that ranks with other parts of the same copy hold too. It is the last.
        repeated_names: the trainable parameters of which that is true, personal ones among them.

    Raises:
        ValueError: see `trainable_parameters` and BufferStatistics.
    """

    def __init__(
        self,
        module: nn.Module,
        is_shared: Callable[[str], bool] = select_all,
        moments: BatchNormReduction = "pooled",
        alignment: int = 1,
        storage: ParameterStorage = WHOLE,
    ):
        self.module, self.storage = module, storage
        trainable = trainable_parameters(module)
        self.boxes = {name: storage.box(parameter) for name, parameter in trainable.items()}
        self.shared_names = _shared_names(trainable, is_shared, storage)
        self.personal_names = [name for name in trainable if not is_shared(name)]
        personal = {id(trainable[name]) for name in self.personal_names}
        # Tied parameters have several names, of which `named_parameters` yields only the first.
        self.personal_aliases = {n for n, p in module.named_parameters(remove_duplicate=False) if id(p) in personal}
        self.frozen_aliases = set(frozen_tensors(module))
        self._trained = {id(parameter) for parameter in trainable.values()}
        first_names = {id(parameter): name for name, parameter in trainable.items()}
        named = module.named_parameters(remove_duplicate=False)
        self.names = {name: first_names[id(p)] for name, p in named if id(p) in first_names}
        shared, own = ([trainable[name] for name in names] for names in (self.shared_names, self.personal_names))
        starts = _offsets(shared, storage)[0]
        repeated = [start for start, p in zip(starts, shared, strict=True) if storage.is_repeated(p)]
        self.repeated_names = {name for name, p in trainable.items() if storage.is_repeated(p)}
        self.shared_layout = self._layout(self.shared_names, starts)
        self.personal_layout = self._layout(self.personal_names, _offsets(own, storage)[0])
        like = next(iter(trainable.values()))
        self.shared, self.shared_parameters = _bind(shared, storage, like, alignment)
        self.repeated = slice(repeated[0] if repeated else len(self.shared), len(self.shared))
        self.personal, personal_parameters = _bind(own, storage, like)
        bound = {
            **dict(zip(self.shared_names, self.shared_parameters, strict=True)),
            **dict(zip(self.personal_names, personal_parameters, strict=True)),
        }
        self.named_trainable = [(name, bound[name]) for name in trainable]
        self.trainable = [parameter for _, parameter in self.named_trainable]
        materialize_buffers(module)
        self.statistics = BufferStatistics(module, is_shared, moments)
        self.personal_statistics = BufferStatistics(module, lambda name: not is_shared(name))
        self.empty_buffers = empty_buffers(module)
        self.saved_names = {*module.state_dict(), *self.empty_buffers}
        self.personal_buffer_names = [name for name, _ in module.named_buffers() if not is_shared(name)]

    @property
    def has_batch_statistics(self) -> bool:
        """Whether any layer normalizes by the statistics of its batch."""
        return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self.module.modules())

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return a view into a vector like `shared` for each of the `shared_parameters`, in their shapes."""
        return [placed.of(vector) for placed in self.shared_layout]

    def named_views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the views into a vector like `shared` by parameter name; tied parameters have several names."""
        views = {placed.name: placed.of(vector) for placed in self.shared_layout}
        return {name: views[first] for name, first in self.names.items() if first in views}

    def _layout(self, names: Sequence[str], starts: Sequence[int]) -> tuple[PlacedBox, ...]:
        return tuple(PlacedBox(name, start, self.boxes[name]) for name, start in zip(names, starts, strict=True))

    def untrained_parameters(self) -> list[str]:
        """Return the names of parameters that require gradients, and were frozen or not there when this was made."""
        named = self.module.named_parameters()
        return [name for name, p in named if p.requires_grad and id(p) not in self._trained]

    def clear_gradients(self) -> None:
        """Set all gradients to None."""
        # An optimizer's `zero_grad` also notifies the profiler, which costs a twentieth of a small model's step.
        for parameter in self.trainable:
            parameter.grad = None

    @torch.no_grad()
    def add_to_gradients(self, tensors: Sequence[Tensor], factor: float = 1.0) -> None:
        """Add factor * tensor to the gradient of each of the `shared_parameters` that has one."""
        pairs = [(p.grad, t) for p, t in zip(self.shared_parameters, tensors, strict=True) if p.grad is not None]
        gradients, added = [gradient for gradient, _ in pairs], [tensor for _, tensor in pairs]
        torch._foreach_add_(gradients, added, alpha=factor)  # pyright: ignore[reportPrivateImportUsage]

    def personal_state(self) -> dict[str, Tensor]:
        """Copy the state of the client in training: the personal vector, and the personal buffers by name."""
        return {name: tensor.clone() for name, tensor in self._personal_tensors().items()}

    @torch.no_grad()
    def load_personal_state(self, state: dict[str, Tensor]) -> None:
        """Load the personal state of a client. Its vector may end with the last parameter, without padding."""
        if self.has_personal:
            self.personal.copy_(pad_or_trim(state["parameters"], len(self.personal)))
            load_buffers(self.module, {name: state[name] for name in self.personal_buffer_names})

    def _personal_tensors(self) -> dict[str, Tensor]:
        return {"parameters": self.personal, **self.personal_buffers} if self.has_personal else {}

    @property
    def personal_buffers(self) -> dict[str, Tensor]:
        """The live buffers that stay with their client, by name."""
        return {name: self.module.get_buffer(name) for name in self.personal_buffer_names}

    @property
    def local_tensors(self) -> dict[str, Tensor]:
        """The live frozen parameters, and buffers that are neither combined nor personal, by name: the rank's own."""
        others = {*self.statistics.names, *self.personal_buffer_names}
        return self.frozen | {name: buffer for name, buffer in self.module.named_buffers() if name not in others}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The live frozen parameters by name. Those that are tied have one name here."""
        named = self.module.named_parameters()
        return {name: self.storage.local(p) for name, p in named if id(p) not in self._trained}

    @property
    def has_personal(self) -> bool:
        """Whether any parameter or buffer stays with its client."""
        return bool(self.personal_names or self.personal_buffer_names)

    @property
    def has_shared(self) -> bool:
        """Whether any parameter or buffer is combined between silos."""
        return bool(self.shared_names or self.statistics.has_buffers)

    def shared_state(self) -> dict[str, Tensor]:
        """Copy the global model: all parameters and buffers by name, except the personal and the frozen ones.

        Buffers that the module has registered since it was made are left out: another one has no place for them.
        """
        names = self.saved_names - {*self.personal_aliases, *self.personal_buffer_names, *self.frozen_aliases}
        return {name: self.storage.local(t).clone() for name, t in self.module.state_dict().items() if name in names}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Load a `shared_state` into the vectors.

        Raises:
            ValueError: the state and the model have different tensors.
        """
        unmatched = sorted((set(state) ^ set(self.shared_state())) - set(self.empty_buffers))
        if unmatched:
            raise ValueError(
                f"model= is not the checkpoint's: only one of the two has tensors named {unmatched}.\n"
                "  set the model of the run, or another run_dir"
            )
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for name in state.keys() & parameters.keys():
            self.storage.local(parameters[name]).copy_(state[name])
        load_buffers(self.module, {name: tensor for name, tensor in state.items() if name not in parameters})


def difference(
    a: Tensor, b: Tensor, factor: float, out: Tensor | None = None, counted: int | None = None
) -> tuple[Tensor, float]:
    """Compute (a - b) * factor and the 2-norm of a - b in one pass over memory.

    Args:
        a: a vector.
        b: a vector of the same length, dtype and device.
        factor: multiplies the difference, not the norm.
        out: where the scaled difference goes; may be `a` or `b`, or None for a new vector.
        counted: how many numbers, from the first, the norm is of; None: all.

    Returns:
        The scaled difference, and the norm, which is not finite if any element of a - b is not.
    """
    out = torch.empty_like(a) if out is None else out
    squares = []
    for block in blocks_of(a, slice(0, len(a))):
        torch.sub(a[block], b[block], out=out[block])
        within = out[slice(block.start, block.stop if counted is None else min(block.stop, counted))]
        squares.append(torch.linalg.vector_norm(within).double().square())
        out[block].mul_(factor)
    return out, float(torch.stack(squares).sum().sqrt())


def pad_or_trim(vector: Tensor, length: int) -> Tensor:
    """Return the vector if it has this length, else a copy with zeros appended or trailing elements removed."""
    if len(vector) == length:
        return vector
    return torch.cat([vector[:length], vector.new_zeros(max(length - len(vector), 0))])


def parameter_layout(
    module: nn.Module, is_shared: Callable[[str], bool] = select_all, storage: ParameterStorage = WHOLE
) -> list[tuple[int, torch.Size]]:
    """Return the offset in a FlatModel's shared vector and the shape of each shared parameter.

    Of a part of the parameter the shape is that of its room, which is equal on all ranks.
    """
    trainable = trainable_parameters(module)
    parameters = [trainable[name] for name in _shared_names(trainable, is_shared, storage)]
    shapes = (_room_shape(storage.room(parameter), storage.box(parameter).shape) for parameter in parameters)
    return list(zip(_offsets(parameters, storage)[0], shapes, strict=True))


def _shared_names(
    trainable: Mapping[str, nn.Parameter], is_shared: Callable[[str], bool], storage: ParameterStorage
) -> list[str]:
    """Return the names of the shared parameters in the order of their vector, in which what is repeated is last."""
    return sorted(filter(is_shared, trainable), key=lambda name: storage.is_repeated(trainable[name]))


def _room_shape(room: int, shape: Sequence[int]) -> torch.Size:
    """Return the shape with as many rows as there is room for."""
    return torch.Size((room // max(prod(shape[1:]), 1), *shape[1:]) if shape else ())


def _offsets(parameters: list[nn.Parameter], storage: ParameterStorage) -> tuple[list[int], int]:
    """Return the offsets of the parameters in their vector, each on a new cache line, and the vector's length."""
    starts, total = [], 0
    for parameter in parameters:
        step = ALIGNMENT_BYTES // parameter.element_size()
        starts.append(total)
        total += -(-storage.room(parameter) // step) * step
    return starts, total


def _bind(
    parameters: list[nn.Parameter], storage: ParameterStorage, like: Tensor, alignment: int = 1
) -> tuple[Tensor, list[nn.Parameter]]:
    """Return a vector of the parameters, and the parameters as views into it."""
    starts, total = _offsets(parameters, storage)
    # The padding after parameters is zero in every silo, so it stays zero in every combination.
    vector = torch.zeros(-(-total // alignment) * alignment, dtype=like.dtype, device=like.device)
    located = zip(parameters, starts, strict=True)
    return vector, [storage.bind(p, vector[start : start + storage.room(p)]) for p, start in located]
