"""Signatures of data: what its examples are like, known of a run without its data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from typing import Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from trainer.data.partition.clients import Clients
from trainer.data.sources.base import DataSplits
from trainer.data.sources.padding import Padding
from trainer.service.version import Datatype, TensorSpec
from trainer.utils.tensor_trees import Tree

DATATYPES: dict[torch.dtype, Datatype] = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}

ANY = -1  # a dimension of any size


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class DataSignature:
    """Types and shapes of the examples of a run, and the names of their classes.

    Attributes:
        inputs: of a batch, before the transforms. Any size have the dimension of the examples, and that in which they
            are padded.
        structure: a single `tensor`; a `mapping`, whose inputs have the names of its keys; or a `sequence`.
        classes: number of classes, or size of the vocabulary; None for other tasks.
        label_names: names of the classes, by label; empty if they have none.
        examples: their number, by part of the data.
    """

    inputs: list[TensorSpec]
    structure: Literal["tensor", "mapping", "sequence"]
    classes: int | None = None
    label_names: list[str] = field(default_factory=list)
    examples: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(splits: DataSplits, clients: Clients | None = None) -> DataSignature | None:
        """Return the signature of a data set; None if its inputs are nested, or of a type that servers do not know.

        Args:
            splits: the data set.
            clients: have the examples; None: their numbers are left out.
        """
        inputs, _ = splits.train.fetch(torch.arange(1))
        named, structure = _named_inputs(inputs)
        if not all(isinstance(tensor, Tensor) and tensor.dtype in DATATYPES for tensor in named.values()):
            return None
        padding: Padding | None = getattr(splits.train, "padding", None)
        padded = set(padding.padded_inputs if padding else ())
        specs = [
            TensorSpec(name, DATATYPES[tensor.dtype], [ANY, *_example_shape(tensor, name in padded)])
            for name, tensor in named.items()
        ]
        return DataSignature(specs, structure, splits.classes, list(splits.label_names), _count_examples(clients))

    @staticmethod
    def from_json(text: str | bytes) -> DataSignature:
        """Read what `to_json` has written.

        Raises:
            ValueError: it is something else.
        """
        try:
            return TypeAdapter(DataSignature).validate_json(text)
        except ValidationError as error:
            raise ValueError(f"it is no signature of data: {error.errors()[0]['msg']}") from error

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"  # pyright: ignore[reportArgumentType] (one of pydantic)

    def tree(self, tensors: Sequence[Tensor]) -> Tree:
        """Return the inputs as the model takes them, from tensors in the order of `inputs`."""
        if self.structure == "tensor":
            return tensors[0]
        if self.structure == "sequence":
            return tuple(tensors)
        return dict(zip((spec.name for spec in self.inputs), tensors, strict=True))


def _named_inputs(inputs: Tree) -> tuple[dict[str, Tree], Literal["tensor", "mapping", "sequence"]]:
    if isinstance(inputs, Tensor):
        return {"inputs": inputs}, "tensor"
    if isinstance(inputs, Mapping):
        return {str(name): tensor for name, tensor in inputs.items()}, "mapping"
    return {f"inputs_{index}": tensor for index, tensor in enumerate(inputs)}, "sequence"


def _count_examples(clients: Clients | None) -> dict[str, int]:
    if clients is None:
        return {}
    parts = {"training": clients.train, "validation": clients.validation, "test": clients.test}
    return {part: sum(map(len, ids)) for part, ids in parts.items()}


def _example_shape(tensor: Tensor, is_padded: bool) -> list[int]:
    return [ANY, *tensor.shape[2:]] if is_padded else list(tensor.shape[1:])
