"""The buffers of a module: those that are statistics, which are averaged, and all others, which stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

BatchNormReduction = Literal["pooled", "mean"]
Place = tuple[nn.Module, str]  # a buffer is looked up there each time, because a layer may assign it anew


def select_all(name: str) -> bool:
    """Return True for any name."""
    return True


class BufferStatistics:
    """The buffers that are combined between ranks, as one float64 vector to average.

    These are the running means and variances of normalization layers: the layers that have both, as floating point
    buffers `running_mean` and `running_var`. With `pooled` moments the vector holds the mean and the second moment,
    var + mean^2, instead of the variance: by the law of total variance, averages of these are the moments of the union.
    With `mean` the variances themselves are averaged, without the variance between the means. Beside them,
    `num_batches_tracked` is combined by its maximum.

    A module may declare other floating point buffers of its own to be averaged, by an attribute `averaged_buffers` with
    their names.

    Args:
        module: has the buffers.
        is_included: whether the buffer of a name is one of these.
        moments: how variances are combined.

    Attributes:
        names: of the buffers.

    Raises:
        ValueError: a declared buffer does not exist, or is not of floating point.
    """

    def __init__(
        self,
        module: nn.Module,
        is_included: Callable[[str], bool] = select_all,
        moments: BatchNormReduction = "pooled",
    ):
        self.plain: list[Place] = []
        self.counters: list[Place] = []
        self.moments: list[nn.Module] = []
        self.names: list[str] = []
        for prefix, layer in module.named_modules():
            path = f"{prefix}." if prefix else ""
            declared = _declared(layer, path)
            if _normalizes(layer) and is_included(f"{path}running_mean"):
                self.names += [f"{path}running_mean", f"{path}running_var"]
                if moments == "pooled":
                    self.moments.append(layer)
                else:
                    self.plain += [(layer, "running_mean"), (layer, "running_var")]
                if isinstance(layer._buffers.get("num_batches_tracked"), Tensor):
                    self.names.append(f"{path}num_batches_tracked")
                    self.counters.append((layer, "num_batches_tracked"))
            for name in declared:
                if is_included(f"{path}{name}"):
                    self.names.append(f"{path}{name}")
                    self.plain.append((layer, name))

    @property
    def has_buffers(self) -> bool:
        """Whether the module has any of these buffers."""
        return bool(self.names)

    def vector(self) -> Tensor:
        """Return the buffers as a float64 vector [k] on the CPU; `load` accepts weighted averages of it."""
        parts = [_at(place).double() for place in self.plain]
        for layer in self.moments:
            mean, variance = (_at((layer, name)).double() for name in ("running_mean", "running_var"))
            parts += [mean, variance + mean.square()]
        return torch.cat([part.reshape(-1).cpu() for part in parts] or [torch.zeros(0, dtype=torch.float64)])

    def counts(self) -> Tensor:
        """Return the counters as an int64 vector on the CPU."""
        parts = [_at(place).reshape(-1).long().cpu() for place in self.counters]
        return torch.cat(parts or [torch.zeros(0, dtype=torch.int64)])

    @torch.no_grad()
    def load(self, vector: Tensor, counts: Tensor) -> None:
        """Write an averaged `vector` and combined `counts` into the buffers."""
        rest = vector
        for buffer in map(_at, self.plain):
            head, rest = rest.split([buffer.numel(), rest.numel() - buffer.numel()])
            buffer.copy_(head.view_as(buffer))
        for layer in self.moments:
            mean, variance = _at((layer, "running_mean")), _at((layer, "running_var"))
            first, second, rest = rest.split([mean.numel(), mean.numel(), rest.numel() - 2 * mean.numel()])
            mean.copy_(first.view_as(mean))
            variance.copy_((second - first.square()).clamp_(min=0).view_as(variance))
        counters = list(map(_at, self.counters))
        for buffer, part in zip(counters, counts.split([buffer.numel() for buffer in counters]), strict=True):
            buffer.copy_(part.view_as(buffer))


@torch.no_grad()
def materialize_buffers(module: nn.Module) -> None:
    """Give buffers whose elements share memory, such as expanded ones, memory of their own, so they can be written."""
    for layer in module.modules():
        for name, buffer in layer._buffers.items():
            if buffer is not None and _spanned_elements(buffer) < buffer.numel():
                layer._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)


def empty_buffers(module: nn.Module) -> list[str]:
    """Return the names of buffers that are registered, and None until the module sets them."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        for name, buffer in layer._buffers.items()
        if buffer is None and name not in layer._non_persistent_buffers_set
    ]


def load_buffers(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy tensors into the buffers of these names, or put them in their place if their shapes differ."""
    for path, tensor in saved.items():
        prefix, _, name = path.rpartition(".")
        _load_buffer(module.get_submodule(prefix), name, tensor, next(module.parameters()).device)


@contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Restore all buffers at the end of the context."""
    before = [
        (layer, {name: buffer if buffer is None else buffer.clone() for name, buffer in layer._buffers.items()})
        for layer in module.modules()
    ]
    yield
    for layer, buffers in before:
        for name in layer._buffers.keys() - buffers.keys():
            delattr(layer, name)
        for name, buffer in buffers.items():
            if buffer is None:
                layer._buffers[name] = None
            else:
                _load_buffer(layer, name, buffer, buffer.device)


@torch.no_grad()
def _load_buffer(layer: nn.Module, name: str, saved: Tensor, device: torch.device) -> None:
    buffer = layer._buffers.get(name)
    if buffer is not None and buffer.shape == saved.shape and buffer.dtype == saved.dtype:
        buffer.copy_(saved)
    else:
        layer.register_buffer(name, saved.to(device, copy=True), name not in layer._non_persistent_buffers_set)


def _spanned_elements(tensor: Tensor) -> int:
    """Return the number of elements of the memory from the tensor's first element to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _normalizes(layer: nn.Module) -> bool:
    mean, variance = (layer._buffers.get(name) for name in ("running_mean", "running_var"))
    if mean is None or variance is None or mean.shape != variance.shape:
        return False
    return mean.is_floating_point() and variance.is_floating_point()


def _declared(layer: nn.Module, path: str) -> list[str]:
    names: list[str] = list(getattr(layer, "averaged_buffers", ()))
    for name in names:
        buffer = layer._buffers.get(name)
        if buffer is None or not buffer.is_floating_point():
            found = "no buffer" if buffer is None else f"a buffer of {str(buffer.dtype).removeprefix('torch.')}"
            raise ValueError(
                f"model= declares in averaged_buffers that {path}{name} is averaged between clients, and it is {found}."
                "\n  valid: names of the layer's own buffers of a floating point type"
            )
    return names


def _at(place: Place) -> Tensor:
    layer, name = place
    buffer = layer._buffers[name]
    assert buffer is not None
    return buffer
