"""Batches of examples of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from trainer.utils.tensor_trees import Tree, concatenate


@dataclass(frozen=True)
class Padding:
    """Pads examples to the longest of their batch; a `collate_fn` as torch's DataLoader takes them.

    The inputs of an example are a dict. What has a length is a tensor [T, ...], an array or a list of numbers, and
    becomes [B, T, ...]. The batch gets a mask, unless the examples bring one: int64 [B, T], 1 for what an example has
    and 0 for padding.

    Attributes:
        inputs: the padding of each input that has a length, by its name: {"input_ids": 0}.
        targets: the padding of targets that have a length, such as -100, which losses ignore; None: they have none.
        mask: the name of the mask among the inputs; None: there is none.
    """

    inputs: Mapping[str, float]
    targets: float | None = None
    mask: str | None = "attention_mask"
    _values: Mapping[str, float] = field(init=False, repr=False)

    def __post_init__(self):
        if not self.inputs:
            raise ValueError('Padding: no input is named\n  give the padding of each by its name: {"input_ids": 0}')
        object.__setattr__(self, "_values", {**self.inputs, **({self.mask: 0} if self.mask else {})})

    def __call__(self, examples: Sequence[tuple[Any, Any]]) -> tuple[Tree, Tree]:
        """Return the inputs and the targets of a batch."""
        inputs = [self._as_tensors(given) for given, _ in examples]
        targets: list[Any] = [target for _, target in examples]
        for name, value in self._values.items():
            columns = _pad([row[name] for row in inputs], 0, value)
            inputs = [{**row, name: column} for row, column in zip(inputs, columns, strict=True)]
        if self.targets is not None:
            targets = _pad(list(map(torch.as_tensor, targets)), 0, self.targets)
        return default_collate(inputs), default_collate(targets)

    @property
    def padded_inputs(self) -> Sequence[str]:
        """The names of the inputs of a batch that are as wide as its longest example."""
        return list(self._values)

    @property
    def padded_targets(self) -> Sequence[str]:
        """The empty name, that of a single tensor, if the targets are padded."""
        return [] if self.targets is None else [""]

    def join(self, batches: Sequence[tuple[Tree, Tree]]) -> tuple[Tree, Tree]:
        """Return one batch of the examples of several, padded to the widest of them."""
        inputs, targets = [{**given} for given, _ in batches], [target for _, target in batches]
        for name, value in self._values.items():
            for row, column in zip(inputs, _pad([row[name] for row in inputs], 1, value), strict=True):
                row[name] = column
        if self.targets is not None:
            targets = _pad(targets, 1, self.targets)
        return concatenate(inputs), concatenate(targets)

    def _as_tensors(self, inputs: Any) -> dict[str, Any]:
        """Return an example's inputs with a tensor for each that has a length, and with a mask."""
        missing = [name for name in self.inputs if not isinstance(inputs, Mapping) or name not in inputs]
        if missing:
            given = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
            raise ValueError(f"Padding needs inputs that are a dict with {', '.join(missing)}; got {given}")
        tensors = {name: torch.as_tensor(inputs[name]) for name in self._values if name in inputs}
        if self.mask and self.mask not in inputs:
            tensors[self.mask] = torch.ones(len(tensors[next(iter(self.inputs))]), dtype=torch.int64)
        return {**inputs, **tensors}


def joiner(source: Any) -> Callable[[Sequence[Any]], Any] | None:
    """Return what makes one batch of several of a source; None if only the user's `collate_fn` could."""
    padding: Padding | None = getattr(source, "padding", None)
    if padding:
        return padding.join
    return concatenate if getattr(source, "collate_fn", default_collate) is default_collate else None


def _pad(tensors: Sequence[Tensor], dim: int, value: float) -> list[Tensor]:
    """Extend tensors in this dimension to the longest of them."""
    width = max(tensor.shape[dim] for tensor in tensors)
    return [
        F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, width - tensor.shape[dim]], value=value)
        for tensor in tensors
    ]
