"""Messages arrive as they were sent; anything else is refused before memory is taken for it."""

import json
import math
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.federation.messages import DTYPES, MAX_HEADER_BYTES, PART_BYTES, Message, MessageError, MessageReader


def read(parts, max_bytes=1 << 30):
    reader = MessageReader(max_bytes)
    for part in parts:
        reader.add(part)
    return reader.finish()


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_bit_arrives(dtype):
    generator = torch.Generator().manual_seed(0)
    content = torch.randint(0, 256, (3 * 8 * 5,), dtype=torch.uint8, generator=generator)
    tensor = content.view(torch.bool) if dtype == torch.bool else content.view(dtype)
    tensor = content.gt(128) if dtype == torch.bool else tensor.view(5, -1)
    arrived = read(Message({"key": "1"}, {"a": tensor, "none": tensor[:0]}).parts())
    assert arrived.header == {"key": "1"}
    assert bits(arrived.tensors["a"]) == bits(tensor)
    assert arrived.tensors["a"].shape == tensor.shape
    assert arrived.tensors["none"].numel() == 0


def test_numbers_of_the_header_arrive_exactly():
    header = {"a": 0.1 + 0.2, "b": 5e-324, "c": math.inf, "d": -0.0, "e": 2**62, "f": [1, {"g": None}]}
    assert read(Message(header).parts()).header == header
    assert math.isnan(read(Message({"a": math.nan}).parts()).header["a"])


def test_a_view_is_sent_as_what_it_shows():
    matrix = torch.arange(12.0).view(3, 4)
    assert torch.equal(read(Message({}, {"a": matrix.t()}).parts()).tensors["a"], matrix.t())


def test_parts_have_their_size():
    parts = list(Message({}, {"a": torch.zeros(PART_BYTES // 4 + 1), "b": torch.zeros(1)}).parts())
    assert [len(part) for part in parts[1:]] == [PART_BYTES, 4, 4]


def header_of(tensors, protocol=1, header=None):
    return json.dumps({"protocol": protocol, "header": header or {}, "tensors": tensors}).encode()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "ended early"),
        ([b"\x80\x04"], "no JSON"),
        ([b"[" * 100_000], "no JSON"),
        ([b"[]"], "no header"),
        ([b" " * (MAX_HEADER_BYTES + 1)], "a header of 1,048,577 bytes"),
        ([header_of([], protocol=2)], "protocol 2; this side speaks 1"),
        ([header_of([], protocol="1")], "protocol '1'"),
        ([header_of({})], "no header"),
        ([header_of([["a", "object", [1]]])], "dtype object"),
        ([header_of([["a", "float32"]])], "name, dtype and shape"),
        ([header_of([["a", "float32", [-1]]])], "shape of a is none"),
        ([header_of([["a", "float32", [1.5]]])], "shape of a is none"),
        ([header_of([["a", "float32", [True]]])], "shape of a is none"),
        ([header_of([["a", "float32", [1] * 17]])], "shape of a is none"),
        ([header_of([["a", "float32", [1]], ["a", "float32", [1]]])], "one name"),
        ([header_of([["a", "float32", [2**40]]])], "tensors of 4,398,046,511,104 bytes; at most 1,073,741,824"),
        ([header_of([["a", "uint8", [1]]])] * 5000, "a part of"),
        ([header_of([["a", "float32", [1]]]), b"12"], "2 bytes are missing"),
        ([header_of([["a", "float32", [1]]]), b""], "a part of 0 bytes"),
        ([header_of([["a", "float32", [1]]]), b"12345"], "a part of 5 bytes, and 4 are missing"),
        ([header_of([["a", "float32", [1]]]), b"1234", b"1"], "a part of 1 bytes, and 0 are missing"),
        ([header_of([[str(n), "float32", [0]] for n in range(4097)])], "no header"),
    ],
)
def test_what_is_no_message_is_refused(parts, reason):
    with pytest.raises(MessageError, match=reason.replace(",", "[,]")):
        read(parts)


def test_a_size_is_refused_before_memory_is_taken():
    part = header_of([["a", "float32", [1 << 24]]])
    tracemalloc.start()
    with pytest.raises(MessageError, match="at most 1,000"):
        MessageReader(1000).add(part)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


values = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
shapes = st.lists(st.integers(-1, 9), max_size=3) | values
described = st.lists(st.tuples(values, st.sampled_from([*DTYPES, "x"]) | values, shapes), max_size=3) | values
headers = st.fixed_dictionaries({"protocol": st.just(1) | values, "header": st.just({}) | values, "tensors": described})


@given(st.lists(st.binary(max_size=64) | headers.map(lambda header: json.dumps(header).encode()), max_size=4))
def test_any_parts_are_a_message_or_refused(parts):
    try:
        message = read(parts, max_bytes=4096)
    except MessageError:
        return
    assert sum(tensor.nbytes for tensor in message.tensors.values()) <= 4096
