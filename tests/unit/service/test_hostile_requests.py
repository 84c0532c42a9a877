"""Requests that no client sends: each is answered, or refused by a sentence with got and wanted."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.exported import INPUTS, OUTPUTS
from trainer.service.errors import InvalidRequestError
from trainer.service.protocol import DTYPES, Signature, decode_request
from trainer.service.version import ModelDescription, TensorSpec

MAX_MESSAGE = 500

numbers = st.integers() | st.integers(-(2**63), 2**64) | st.floats() | st.sampled_from([0, 1, 4, -1, 2**31])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=5)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
names = st.sampled_from(["inputs", "outputs", "label", "", "../inputs", "\0"]) | st.text(max_size=5)
shapes = st.sampled_from([[1, 4], [2, 4], [4], [0, 4], [-1, 4], [1, 4, 1], [2**62, 4], []]) | st.lists(
    numbers, max_size=3
)
parameters = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "binary_data_output", "timeout"]), scalars, max_size=2
)


def objects(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return objects with some of these fields, or something else."""
    return st.fixed_dictionaries({}, optional=fields) | trees


tensors = objects(
    name=names | trees,
    datatype=st.sampled_from([*DTYPES, "BYTES", "fp32"]) | trees,
    shape=shapes | trees,
    data=st.lists(st.floats(width=32), min_size=4, max_size=4) | trees,
    parameters=parameters | trees,
)
requests = objects(
    id=st.text(max_size=5) | trees,
    inputs=st.lists(tensors, max_size=2) | trees,
    outputs=st.lists(objects(name=names | trees, parameters=parameters | trees), max_size=2) | trees,
    parameters=parameters | trees,
)
header_lengths = st.none() | st.integers(-1, 300)


@cache
def signature(datatype: str) -> Signature:
    return Signature(
        ModelDescription(
            inputs=[TensorSpec(INPUTS[0].name, datatype, INPUTS[0].shape)],  # pyright: ignore[reportArgumentType]
            outputs=OUTPUTS,
            task="",
            headline="",
            sha256={},
        )
    )


def check(body: bytes, header_length: int | None, datatype: str = "FP32") -> None:
    """Decode a request: it fits the signature, or a short sentence says why not."""
    try:
        request = decode_request(body, header_length, signature(datatype))
    except InvalidRequestError as error:
        message = str(error)
    else:
        (tensor,) = request.inputs.values()
        assert (tensor.shape[1:], tensor.dtype) == ((4,), DTYPES[datatype])
        assert request.rows > 0 and set(request.outputs) <= {"outputs", "label"} and type(request.id) is str
        return
    assert ": got " in message and ", wanted " in message and len(message) < MAX_MESSAGE


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), header_lengths)
def test_bytes(body: bytes, header_length: int | None) -> None:
    check(body, header_length)


@settings(max_examples=400, deadline=None)
@given(requests, st.binary(max_size=40), header_lengths, st.sampled_from(list(DTYPES)))
def test_trees(tree: Any, behind: bytes, header_length: int | None, datatype: str) -> None:
    check(json.dumps(tree).encode() + behind, header_length, datatype)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(list(DTYPES)), st.integers(0, 2), st.integers(-8, 40), shapes)
def test_bytes_of_tensors(data: st.DataObject, datatype: str, rows: int, missing: int, shape: list[Any]) -> None:
    """The length in the header, that in the tree, and that of the bytes, each right or wrong."""
    size = rows * 4 * DTYPES[datatype].itemsize
    claimed = data.draw(st.sampled_from([size, size - missing, -size, 2**63]))
    shape = data.draw(st.sampled_from([[rows, 4], shape]))
    tensor = {"name": "inputs", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": claimed}}
    head = json.dumps({"inputs": [tensor]}).encode()
    header_length = data.draw(st.sampled_from([len(head), len(head) + missing, None]))
    check(head + bytes(data.draw(st.sampled_from([size, max(size - missing, 0)]))), header_length, datatype)


@pytest.mark.parametrize("datatype", list(DTYPES))
def test_a_right_request_of_each_type_is_taken(datatype: str) -> None:
    tensor = np.ones((2, 4), DTYPES[datatype])
    described = {"name": "inputs", "datatype": datatype, "shape": [2, 4]}
    head = json.dumps({"inputs": [{**described, "parameters": {"binary_data_size": tensor.nbytes}}]}).encode()
    by_bytes = decode_request(head + tensor.tobytes(), len(head), signature(datatype))
    by_numbers = decode_request(
        json.dumps({"inputs": [{**described, "data": tensor.tolist()}]}).encode(), None, signature(datatype)
    )
    for request in (by_bytes, by_numbers):
        np.testing.assert_array_equal(request.inputs["inputs"], tensor)
        assert request.inputs["inputs"].dtype == tensor.dtype


@pytest.mark.parametrize("opening", [b"[", b'{"inputs":[', b'{"a":'])
def test_deep_trees_are_refused(opening: bytes) -> None:
    check(opening * 200_000, None)


def test_nested_data_as_deep_as_json_may_be_is_refused_or_read() -> None:
    deep: Any = [1.0, 2.0, 3.0, 4.0]
    for _ in range(500):
        deep = [deep]
    check(
        json.dumps({"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [1, 4], "data": deep}]}).encode(), None
    )
