"""Made-up inputs: seeded random numbers of a signature's shapes and types. No example of the data is ever exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data.sources.signature import ANY, DATATYPES, DataSignature
from trainer.service.version import TensorSpec
from trainer.utils.seeding import generator

STEPS = 64  # fractions with this denominator are exact in every type, and short as text
DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}
DATATYPES_OF_NUMPY = {str(torch.empty(0, dtype=dtype).numpy().dtype): name for dtype, name in DATATYPES.items()}


def make_inputs(signature: DataSignature, model: nn.Module, examples: int, length: int) -> tuple[Tensor, ...]:
    """Make a batch of inputs, the same in every call.

    Floating-point numbers are in [0, 1). Tokens are below the vocabulary of the model. Masks are 1, and other whole
    numbers 0 or 1.

    Args:
        signature: the inputs.
        model: that takes them.
        examples: number of examples.
        length: of dimensions of any size, but the first.
    """
    sizes: Iterator[Any] = (getattr(layer, "num_embeddings", None) for layer in model.modules())
    vocabulary: int = next(filter(None, sizes), 2)
    return tuple(
        _make(spec, "mask" in spec.name, vocabulary if _is_tokens(spec, signature) else 2, examples, length)
        for spec in signature.inputs
    )


def request(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return a request of the Open Inference Protocol with these inputs."""
    return {"inputs": _tensors(inputs)}


def response(name: str, outputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the reply of a model to a request. It has no version, as that is not known before it is written."""
    return {"model_name": name, "outputs": _tensors(outputs)}


def _make(spec: TensorSpec, is_mask: bool, below: int, examples: int, length: int) -> Tensor:
    shape = [examples, *(length if size == ANY else size for size in spec.shape[1:])]
    dtype, random = DTYPES[spec.datatype], generator(0, "made-up inputs", spec.name)
    if is_mask or dtype is torch.bool:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point:
        return (torch.randint(STEPS, shape, generator=random) / STEPS).to(dtype)
    return torch.randint(below, shape, generator=random).to(dtype)


def _is_tokens(spec: TensorSpec, signature: DataSignature) -> bool:
    """Return whether an input is that of the tokens: the only one, or the one that Hugging Face calls so."""
    return len(signature.inputs) == 1 or spec.name == "input_ids"


def _tensors(arrays: Mapping[str, np.ndarray]) -> Sequence[dict[str, Any]]:
    return [
        {
            "name": name,
            "datatype": DATATYPES_OF_NUMPY[str(array.dtype)],
            "shape": list(array.shape),
            "data": array.ravel().tolist(),
        }
        for name, array in arrays.items()
    ]
