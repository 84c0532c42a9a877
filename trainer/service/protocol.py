"""Requests and responses of the Open Inference Protocol: as JSON, with tensors in it or as bytes behind it.

The protocol: https://github.com/kserve/open-inference-protocol; Triton's documentation has the extension for bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from trainer.service.errors import unlike

if TYPE_CHECKING:
    from trainer.service.engine import Tensors
    from trainer.service.version import ModelDescription, TensorSpec

DTYPES = {
    "BOOL": np.dtype("?"),
    **{f"UINT{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"INT{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}

# Python's types of the elements of tensors in JSON, by the kind of their dtype.
ELEMENTS = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A request that fits its model.

    Attributes:
        inputs: all inputs of the model, with the same number of rows.
        outputs: names of the outputs to answer.
        binary: those of them to answer as bytes.
        id: given back with the answer.
        timeout_us: microseconds that the client waits for; 0: as long as it takes.
    """

    inputs: Tensors
    outputs: Sequence[str]
    binary: frozenset[str] = frozenset()
    id: str = ""
    timeout_us: int = 0

    @property
    def rows(self) -> int:
        """Number of examples."""
        return len(next(iter(self.inputs.values())))


class Signature:
    """Inputs and outputs of a model, to check requests by."""

    def __init__(self, description: ModelDescription):
        self.inputs = {spec.name: spec for spec in description.inputs}
        self.outputs = {spec.name: spec for spec in description.outputs}
        self.is_batched = all(spec.shape[0] == -1 for spec in description.inputs)

    def check_input(self, name: str, datatype: str, shape: Sequence[int]) -> TensorSpec:
        """Return the specification of an input.

        Raises:
            InvalidRequestError: the model has no such input, or another data type or shape of it.
        """
        spec = self.inputs.get(name)
        if spec is None:
            raise unlike("input", name, " or ".join(self.inputs))
        if datatype != spec.datatype:
            raise unlike(f"datatype of {name}", datatype, spec.datatype)
        fits = len(shape) == len(spec.shape) and all(
            size == wanted or (wanted == -1 and size > 0) for size, wanted in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise unlike(f"shape of {name}", list(shape), f"{spec.shape}, where -1 is any size but 0")
        return spec

    def check_outputs(self, names: Sequence[str]) -> Sequence[str]:
        """Return the outputs to answer: the requested ones, or all if none are."""
        for name in names:
            if name not in self.outputs:
                raise unlike("output", name, " or ".join(self.outputs))
        return names or list(self.outputs)

    def check_whole(self, inputs: Tensors, given: int) -> None:
        """Check that each input was given, once, and that all have the same number of rows."""
        if given != len(self.inputs) or len(inputs) != given:
            raise unlike("inputs", list(inputs), f"each of {', '.join(self.inputs)} once")
        if len(rows := {len(tensor) for tensor in inputs.values()}) > 1:
            raise unlike("number of rows", sorted(rows), "the same in all inputs")


def from_bytes(name: str, raw: bytes | memoryview, datatype: str, shape: Sequence[int]) -> np.ndarray:
    """Read a tensor from its bytes, without a copy if they are aligned."""
    dtype = DTYPES[datatype]
    if len(raw) != (size := math.prod(shape) * dtype.itemsize):
        raise unlike(f"data of {name}", f"{len(raw)} bytes", f"{size} bytes")
    if dtype.kind == "b":
        return (np.frombuffer(raw, np.uint8) != 0).reshape(shape)
    return np.require(np.frombuffer(raw, dtype).reshape(shape), requirements="A")


def from_list(name: str, data: Any, datatype: str, shape: Sequence[int]) -> np.ndarray:
    """Read a tensor from numbers, flat or nested in lists."""
    dtype = DTYPES[datatype]
    flat = _flatten(name, data)
    if len(flat) != (size := math.prod(shape)):
        raise unlike(f"data of {name}", f"{len(flat)} elements", f"{size} elements")
    if not set(map(type, flat)) <= ELEMENTS[dtype.kind]:
        raise unlike(f"data of {name}", next(x for x in flat if type(x) not in ELEMENTS[dtype.kind]), datatype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if min(flat) < limits.min or max(flat) > limits.max:
            raise unlike(f"data of {name}", [min(flat), max(flat)], f"{datatype}: {limits.min} to {limits.max}")
    with np.errstate(over="ignore"):  # a number that is too large is infinite, as it is in PyTorch
        return np.array(flat, dtype).reshape(shape)


def _flatten(name: str, data: Any) -> Sequence[Any]:
    try:
        while data and type(data[0]) is list:
            if len(set(map(len, data))) > 1:
                raise unlike(f"data of {name}", "lists of several lengths", "numbers, flat or nested as in its shape")
            data = list(chain.from_iterable(data))
    except (TypeError, KeyError):  # numbers beside lists, an object
        data = None
    if type(data) is not list:
        raise unlike(f"data of {name}", "no list of numbers", "numbers, flat or nested as in its shape")
    return data


def decode_request(body: bytes, header_length: int | None, signature: Signature) -> InferenceRequest:
    """Read and check a request.

    Args:
        body: JSON, and the bytes of tensors behind it.
        header_length: of the JSON; None: all of it.
        signature: of the model.

    Raises:
        InvalidRequestError: it is not as the protocol or the model wants it.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise unlike("Inference-Header-Content-Length", header_length, f"0 to {len(body)}, the length of the body")
    view = memoryview(body)
    tree = _Tree("request", _parse(view[:header_length]))
    behind = view[len(body) if header_length is None else header_length :]
    inputs: Tensors = {}
    given = tree.trees("inputs")
    for tensor in given:
        name, datatype, shape = tensor.get("name", str), tensor.get("datatype", str), tensor.get("shape", list)
        if not all(type(size) is int for size in shape):
            raise unlike(f"shape of {name}", shape, "whole numbers")
        signature.check_input(name, datatype, shape)
        size = tensor.parameters().get("binary_data_size", int, -1)
        if size < 0:
            inputs[name] = from_list(name, tensor.values.get("data"), datatype, shape)
        else:
            inputs[name] = from_bytes(name, behind[:size], datatype, shape)
            behind = behind[size:]
    signature.check_whole(inputs, len(given))
    if behind:
        raise unlike("body", f"{len(behind)} bytes behind the last tensor", "none")
    parameters = tree.parameters()
    requested = tree.trees("outputs")
    outputs = signature.check_outputs([output.get("name", str) for output in requested])
    by_default = parameters.get("binary_data_output", bool, False)
    flags = [output.parameters().get("binary_data", bool, by_default) for output in requested]
    binary = zip(outputs, flags or [by_default] * len(outputs), strict=True)
    return InferenceRequest(
        inputs,
        outputs,
        frozenset(name for name, is_binary in binary if is_binary),
        tree.get("id", str, ""),
        max(parameters.get("timeout", int, 0), 0),
    )


def encode_response(model: str, version: int, request: InferenceRequest, outputs: Tensors) -> tuple[bytes, int | None]:
    """Return the body of a response, and the length of its JSON if bytes of tensors are behind it."""
    tensors: list[dict[str, Any]] = []
    behind: list[bytes] = []
    for name in request.outputs:
        tensor = np.ascontiguousarray(outputs[name])
        described: dict[str, Any] = {"name": name, "datatype": datatype_of(tensor.dtype), "shape": tensor.shape}
        if name in request.binary:
            behind.append(tensor.tobytes())
            described["parameters"] = {"binary_data_size": tensor.nbytes}
        else:
            described["data"] = tensor.ravel()
        tensors.append(described)
    tree = {"model_name": model, "model_version": str(version), "outputs": tensors}
    header = orjson.dumps({**tree, "id": request.id} if request.id else tree, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([header, *behind]), len(header)) if behind else (header, None)


def datatype_of(dtype: np.dtype) -> str:
    """Return the protocol's name of a dtype."""
    return _NAMES[dtype]


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Tree:
    """An object of JSON that a client has sent: asked for a value, it names the one that is not as it should be."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if type(self.values) is not dict:
            raise unlike(self.name, self.values, "an object")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key, default)
        if type(value) is not kind:
            raise unlike(f"{key} of {self.name}", value, f"{_KINDS[kind]}")
        return value

    def trees(self, key: str) -> list[_Tree]:
        return [_Tree(f"{key}[{index}]", value) for index, value in enumerate(self.get(key, list, []))]

    def parameters(self) -> _Tree:
        return _Tree(f"parameters of {self.name}", self.values.get("parameters", {}))


_KINDS = {str: "a text", list: "a list", int: "a whole number", bool: "true or false"}


def _parse(text: memoryview) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise unlike("request", f"no JSON: {error}", "JSON") from error
