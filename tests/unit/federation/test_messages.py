"""Messages arrive as they were sent; anything else is refused before memory is taken for it."""

import json
import math
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from trainer.federation.messages import (
    DTYPES,
    HUGE_BYTES,
    MAX_HEADER_BYTES,
    PART_BYTES,
    Limit,
    Message,
    MessageError,
    MessageReader,
    read_header,
    read_message,
    read_parts,
    write_message,
)


def read(parts, max_bytes=1 << 30):
    reader = MessageReader(Limit(max_bytes))
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
    parts = list(Message({}, {"a": torch.zeros(PART_BYTES // 4 + 1), "b": torch.zeros(1), "c": torch.zeros(2)}).parts())
    assert [len(part) for part in parts[1:]] == [PART_BYTES, 4, 12]


def test_a_large_message_arrives_in_memory_and_in_a_file(tmp_path):
    tensor = torch.arange(HUGE_BYTES // 4 + 5, dtype=torch.int32)
    assert torch.equal(read(Message({}, {"a": tensor}).parts()).tensors["a"], tensor)
    write_message(tmp_path / "a.safetensors", Message({}, {"a": tensor}))
    assert torch.equal(read_message(tmp_path / "a.safetensors").tensors["a"], tensor)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_message_is_a_safetensors_file(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(3), "c": torch.tensor([True]), "d": torch.tensor(0.5)}
    file = tmp_path / "a.safetensors"
    write_message(file, Message({"key": "1"}, tensors))
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert list(read_parts(file)) == list(Message({"key": "1"}, tensors).parts())
    again = read_message(file)
    assert again.header == read_header(file) == {"key": "1"}
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in tensors.items())


def test_parts_go_to_a_file(tmp_path):
    message = Message({"key": "1"}, {"a": torch.randn(PART_BYTES), "b": torch.arange(3)})
    with open(tmp_path / "a.safetensors", "wb") as file:
        reader = MessageReader(Limit(1 << 30), file)
        for part in message.parts():
            reader.add(part)
        assert reader.finish().header == message.header
    arrived = read_message(tmp_path / "a.safetensors")
    assert all(torch.equal(arrived.tensors[name], tensor) for name, tensor in message.tensors.items())


def first_part(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


def header_of(tensors, protocol="1", header="{}"):
    return first_part({"__metadata__": {"protocol": protocol, "header": header}, **tensors})


def float_of(shape, end, begin=0):
    return {"a": {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}


BYTE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
ONE = header_of(float_of([1], 4))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "ended early"),
        ([b"\x80\x04"], "no header"),
        ([b""], "no header"),
        ([first_part(b"\x80\x04")], "no JSON"),
        ([first_part(b"[" * 100_000)], "no JSON"),
        ([first_part(b"[]")], "no header"),
        ([first_part({})], "no header"),
        ([first_part({"__metadata__": 1})], "no header"),
        ([ONE[:-1]], "no header"),
        ([b" " * (MAX_HEADER_BYTES + 1)], "a header of 1,048,577 bytes"),
        ([header_of({}, protocol="2")], "protocol 2; this side speaks 1"),
        ([header_of({}, protocol=1)], "no header|protocol 1; this side"),
        ([header_of({}, header="[]")], "no header"),
        ([header_of({}, header="{")], "no JSON"),
        ([header_of({}, header=None)], "no header"),
        ([header_of({"a": []})], "a is not described"),
        ([header_of({"a": {"dtype": "F32", "shape": [1]}})], "a is not described"),
        ([header_of({"a": {"dtype": "object", "shape": [1], "data_offsets": [0, 4]}})], "dtype object"),
        ([header_of(float_of([-1], 4))], "shape of a is none"),
        ([header_of(float_of([1.5], 4))], "shape of a is none"),
        ([header_of(float_of([True], 4))], "shape of a is none"),
        ([header_of(float_of([1] * 17, 4))], "shape of a is none"),
        ([header_of(float_of(1, 4))], "shape of a is none"),
        ([header_of(float_of([1], 8))], "data_offsets of a are none"),
        ([header_of(float_of([1], 8, 4))], "data_offsets of a are none"),
        ([header_of({"b": BYTE, **float_of([1], 5, 1)})], "data_offsets of a are none"),
        ([header_of(float_of([2**40], 2**42))], "tensors of 4,398,046,511,104 bytes; at most 1,073,741,824"),
        ([ONE] * 50, "a part of"),
        ([ONE, b"12"], "2 bytes are missing"),
        ([ONE, b""], "a part of 0 bytes"),
        ([ONE, b"12345"], "a part of 5 bytes, and 4 are missing"),
        ([ONE, b"1234", b"1"], "a part of 1 bytes, and 0 are missing"),
        ([header_of({str(n): BYTE for n in range(4097)})], "no header"),
    ],
)
def test_what_is_no_message_is_refused(parts, reason):
    with pytest.raises(MessageError, match=reason.replace(",", "[,]")):
        read(parts)


def test_a_size_is_refused_before_memory_is_taken():
    part = header_of(float_of([1 << 24], 1 << 26))
    tracemalloc.start()
    with pytest.raises(MessageError, match="at most 1,000"):
        MessageReader(Limit(1000)).add(part)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


values = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
shapes = st.lists(st.integers(-1, 9), max_size=3) | values
offsets = st.lists(st.integers(-1, 99), max_size=3) | values
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "x"]) | values, "shape": shapes, "data_offsets": offsets}
)
metadata = st.fixed_dictionaries({"protocol": st.just("1") | values, "header": st.just("{}") | values})
headers = st.dictionaries(st.text(max_size=3), entries | values, max_size=3).flatmap(
    lambda tensors: (metadata | values).map(lambda found: {"__metadata__": found, **tensors})
)


@given(st.lists(st.binary(max_size=64) | headers.map(first_part), max_size=4))
def test_any_parts_are_a_message_or_refused(parts):
    try:
        message = read(parts, max_bytes=4096)
    except MessageError:
        return
    assert sum(tensor.nbytes for tensor in message.tensors.values()) <= 4096
