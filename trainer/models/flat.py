"""A model whose trainable parameters are views into two vectors: one that travels between silos and one that stays.

Copying, subtracting and sending a whole model is then one operation on one vector. The views are written with
`copy_`; they are never rebound after DistributedDataParallel has wrapped the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

BatchNormReduction = Literal["pooled", "mean"]

ALIGNMENT_BYTES = 64  # each parameter starts on a cache line, as a tensor of its own would


BLOCK = 1 << 19  # numbers: what several operations go over one after the other stays in a processor's cache


def blocks_of(vector: Tensor, part: slice) -> list[slice]:
    """The part of the vector in blocks, at least one. On a GPU it is one: many kernels take longer than many bytes."""
    length = BLOCK if vector.device.type == "cpu" else max(part.stop - part.start, 1)
    return [slice(start, min(start + length, part.stop)) for start in range(part.start, part.stop, length)] or [part]


def share_all(name: str) -> bool:
    """True: the rule by which every tensor is shared."""
    return True


class FlatModel:
    """A module, its trainable parameters as the vectors `shared` and `personal`, and its buffers beside them.

    `is_shared` says of a parameter's or buffer's name whether it is combined between the silos; what is not stays with
    its client. Frozen parameters are neither trained nor sent. The shared vector's length is a multiple of
    `unit`. Raises ValueError when the module has nothing to train, or trainable parameters of several dtypes.
    """

    def __init__(
        self,
        module: nn.Module,
        is_shared: Callable[[str], bool] = share_all,
        moments: BatchNormReduction = "pooled",
        alignment: int = 1,
    ):
        self.module = module
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        dtypes = sorted({str(p.dtype) for p in trainable.values()})
        if len(dtypes) != 1:
            found = "no parameter that trains" if not dtypes else f"trainable parameters of several types: {dtypes}"
            raise ValueError(f"model= has {found}.\n  valid: one floating point type for all that trains")
        self.named_trainable = list(trainable.items())
        self.trainable = list(trainable.values())
        self.shared_names = [name for name in trainable if is_shared(name)]
        self.personal_names = [name for name in trainable if not is_shared(name)]
        own = {id(trainable[name]) for name in self.personal_names}
        # Tied parameters have several names, of which `named_parameters` says the first.
        self.personal_aliases = {n for n, p in module.named_parameters(remove_duplicate=False) if id(p) in own}
        self.shared_parameters = [trainable[name] for name in self.shared_names]
        self.shared = _flatten(self.shared_parameters, self.trainable[0], alignment)
        self.personal = _flatten([trainable[name] for name in self.personal_names], self.trainable[0])
        buffers = dict(module.named_buffers())
        self.statistics = BufferStatistics({name: b for name, b in buffers.items() if is_shared(name)}, moments)
        self.personal_buffers = {name: b for name, b in buffers.items() if not is_shared(name)}
        self.personal_statistics = BufferStatistics(self.personal_buffers)

    @property
    def has_batch_statistics(self) -> bool:
        """Whether a layer normalises by the statistics of the batch it is given."""
        return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self.module.modules())

    def views(self, vector: Tensor) -> list[Tensor]:
        """What a vector like `shared` holds for each of the `shared_parameters`, in their shapes."""
        starts, _ = _parameter_offsets(self.shared_parameters)
        places = zip(self.shared_parameters, starts, strict=True)
        return [vector[start : start + p.numel()].view_as(p) for p, start in places]

    def named_views(self, vector: Tensor) -> dict[str, Tensor]:
        """What a vector like `shared` holds, by the names of the parameters; tied ones have several."""
        views = dict(zip(map(id, self.shared_parameters), self.views(vector), strict=True))
        named = self.module.named_parameters(remove_duplicate=False)
        return {name: views[id(parameter)] for name, parameter in named if id(parameter) in views}

    def clear_gradients(self) -> None:
        """Leaves no gradient. An optimizer's `zero_grad` also talks to the profiler: a twentieth of a small step."""
        for parameter in self.trainable:
            parameter.grad = None

    @torch.no_grad()
    def add_to_gradients(self, tensors: Sequence[Tensor], factor: float = 1.0) -> None:
        """Adds a tensor for each of the `shared_parameters`, times the factor, to its gradient if it has one."""
        pairs = [(p.grad, t) for p, t in zip(self.shared_parameters, tensors, strict=True) if p.grad is not None]
        gradients, added = [gradient for gradient, _ in pairs], [tensor for _, tensor in pairs]
        torch._foreach_add_(gradients, added, alpha=factor)  # pyright: ignore[reportPrivateImportUsage]

    def personal_state(self) -> dict[str, Tensor]:
        """Copies of what belongs to the client being trained: the personal vector, and the personal buffers by name."""
        return {name: tensor.clone() for name, tensor in self._personal_tensors().items()}

    @torch.no_grad()
    def load_personal_state(self, state: dict[str, Tensor]) -> None:
        """Puts the personal tensors of a client in place."""
        for name, tensor in self._personal_tensors().items():
            tensor.copy_(state[name])

    def _personal_tensors(self) -> dict[str, Tensor]:
        return {"parameters": self.personal, **self.personal_buffers} if self.has_personal else {}

    @property
    def has_personal(self) -> bool:
        """Whether anything of the model stays with its client."""
        return bool(self.personal_names or self.personal_buffers)

    @property
    def has_shared(self) -> bool:
        """Whether anything of the model is combined between the silos."""
        return bool(self.shared_names or self.statistics.has_buffers)

    def shared_state(self) -> dict[str, Tensor]:
        """Copies of all parameters and buffers by name, but for the personal ones: the global model."""
        personal = {*self.personal_aliases, *self.personal_buffers}
        return {name: t.clone() for name, t in self.module.state_dict().items() if name not in personal}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Puts a `shared_state` back, into the vectors."""
        apart = sorted(set(state) ^ set(self.shared_state()))
        if apart:
            raise ValueError(f"model= is not the checkpoint's: only one of the two has tensors named {apart}.")
        self.module.load_state_dict(state, strict=False)


def difference(a: Tensor, b: Tensor, factor: float, out: Tensor | None = None) -> tuple[Tensor, float]:
    """(a - b) * factor for two vectors, and the 2-norm of a - b: not finite unless all of its numbers are.

    One pass over the memory. `out` may be one of the two.
    """
    out = torch.empty_like(a) if out is None else out
    squares = []
    for block in blocks_of(a, slice(0, len(a))):
        torch.sub(a[block], b[block], out=out[block])
        squares.append(torch.linalg.vector_norm(out[block]).double().square())
        out[block].mul_(factor)
    return out, float(torch.stack(squares).sum().sqrt())


def pad_or_trim(vector: Tensor, length: int) -> Tensor:
    """The vector, if it has this length; else a copy with more or less of the zeros that it is padded with."""
    if len(vector) == length:
        return vector
    return torch.cat([vector[:length], vector.new_zeros(max(length - len(vector), 0))])


def parameter_layout(module: nn.Module, is_shared: Callable[[str], bool] = share_all) -> list[tuple[int, torch.Size]]:
    """Where in a FlatModel's shared vector each of its parameters starts, and the parameter's shape."""
    parameters = [p for name, p in module.named_parameters() if p.requires_grad and is_shared(name)]
    return list(zip(_parameter_offsets(parameters)[0], (p.shape for p in parameters), strict=True))


class BufferStatistics:
    """The buffers that are combined between ranks, as one float64 vector that may be averaged.

    BatchNorm's running mean and variance are `pooled` by the law of total variance: the vector holds the mean and the
    second moment, var + mean^2, whose averages are those of the union. As a `mean` they are averaged one by one, like
    all other floating point buffers: the variance then lacks that of the means. Integer buffers (counters) are combined
    by their maximum.
    """

    def __init__(self, buffers: dict[str, Tensor], moments: BatchNormReduction = "pooled"):
        self.counters = [b for b in buffers.values() if not b.is_floating_point()]
        variances = [name for name in buffers if name.endswith("running_var") and moments == "pooled"]
        self.moments = [(buffers[name.removesuffix("var") + "mean"], buffers[name]) for name in variances]
        paired = {id(buffer) for pair in self.moments for buffer in pair}
        self.plain = [b for b in buffers.values() if b.is_floating_point() and id(b) not in paired]

    @property
    def has_buffers(self) -> bool:
        """Whether there are buffers."""
        return bool(self.plain or self.moments or self.counters)

    def vector(self) -> Tensor:
        """The float64 vector [k] on the CPU whose weighted averages `load` understands."""
        parts = [buffer.double() for buffer in self.plain]
        for mean, variance in self.moments:
            parts += [mean.double(), variance.double() + mean.double().square()]
        return torch.cat([part.reshape(-1).cpu() for part in parts] or [torch.zeros(0, dtype=torch.float64)])

    def counts(self) -> Tensor:
        """The integer buffers as one int64 vector on the CPU."""
        parts = [buffer.reshape(-1).long().cpu() for buffer in self.counters]
        return torch.cat(parts or [torch.zeros(0, dtype=torch.int64)])

    @torch.no_grad()
    def load(self, vector: Tensor, counts: Tensor) -> None:
        """Writes an averaged `vector` and `counts` back into the buffers."""
        rest = vector
        for buffer in self.plain:
            head, rest = rest.split([buffer.numel(), rest.numel() - buffer.numel()])
            buffer.copy_(head.view_as(buffer))
        for mean, variance in self.moments:
            first, second, rest = rest.split([mean.numel(), mean.numel(), rest.numel() - 2 * mean.numel()])
            mean.copy_(first.view_as(mean))
            variance.copy_((second - first.square()).clamp_(min=0).view_as(variance))
        for buffer, part in zip(self.counters, counts.split([b.numel() for b in self.counters]), strict=True):
            buffer.copy_(part.view_as(buffer))


def _parameter_offsets(parameters: list[nn.Parameter]) -> tuple[list[int], int]:
    """Where in their vector parameters begin, each on a cache line of its own; and the vector's length."""
    starts, total = [], 0
    for parameter in parameters:
        step = ALIGNMENT_BYTES // parameter.element_size()
        starts.append(total)
        total += -(-parameter.numel() // step) * step
    return starts, total


def _flatten(parameters: list[nn.Parameter], like: Tensor, alignment: int = 1) -> Tensor:
    starts, total = _parameter_offsets(parameters)
    # The padding behind parameters is zero in every silo, so it stays zero through every combination.
    vector = torch.zeros(-(-total // alignment) * alignment, dtype=like.dtype, device=like.device)
    for parameter, start in zip(parameters, starts, strict=True):
        view = vector[start : start + parameter.numel()].view_as(parameter)
        view.copy_(parameter.detach())
        parameter.data = view
    return vector
