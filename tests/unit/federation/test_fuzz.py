"""Whatever a member sends: the coordinator answers with a sentence, takes no memory, and serves the others."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.coordinator import (
    DELTA,
    HONEST,
    KEY,
    LIMIT,
    Federation,
    answer,
    coordinating,
    credentials,
    joined_by_force,
    parts_of,
)
from trainer.federation.certificates import certify
from trainer.federation.link import FETCH, JOIN, MEET
from trainer.federation.messages import DTYPES, LENGTH_BYTES

ANSWERS = {  # of a handler of ours; an exception of it would be UNKNOWN
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.OUT_OF_RANGE,
}
MAX_GROWTH = 64 << 20  # of the memory of the process, over all examples

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
numbers = values | st.sampled_from([0, 1, 2**31, 2**62, 10**400, -1])
headers = st.fixed_dictionaries(
    {},
    optional={
        "session": st.just("1") | values,
        "key": st.sampled_from([KEY, "rounds/1/training", "start/model", "../x", ""]) | values,
        "saved": numbers,
        "rounds": numbers,
        "sums": st.just({"weight": 1.0}) | values,
        "x": values,
    },
)
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F8"]) | values, "shape": st.lists(numbers, max_size=3) | values},
    optional={"data_offsets": st.just([0, 12]) | st.lists(numbers, max_size=3) | values},
)
layouts = st.dictionaries(st.sampled_from(["table/counts", "vector/delta", "x"]), entries | values, max_size=3)


def first_part(header: Any, layout: dict[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": {"protocol": "1", "header": json.dumps(header)}, **layout}).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


@st.composite
def mutated(draw: st.DrawFn) -> list[bytes]:
    """Draw the honest message with a change of its bytes, or of the order of its parts."""
    first, rest = parts_of(HONEST)
    kind = draw(st.sampled_from(["byte", "cut", "swap", "split", "again"]))
    if kind == "byte":
        at, changed = draw(st.integers(0, len(first) - 1)), bytearray(first)
        changed[at] ^= draw(st.integers(1, 255))
        return [bytes(changed), rest[:-1]]  # it would be whole if the byte was in a number
    if kind == "cut":
        return [first, rest[: draw(st.integers(0, len(rest) - 1))]]
    if kind == "swap":
        return [rest, first]
    if kind == "split":
        return [first[: draw(st.integers(0, len(first) - 1))], rest]
    return [first, rest, *draw(st.lists(st.sampled_from([first, rest, b""]), min_size=1, max_size=3))]


streams = (
    st.lists(st.binary(max_size=64), max_size=3)
    | st.builds(
        lambda header, layout, rest: [first_part(header, layout), *rest], headers, layouts, st.lists(st.binary())
    )
    | mutated()
)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("fuzz")
    certify(folder / "certs", ["coordinator", "berlin", "paris"])
    with coordinating(folder / "certs", folder / "run") as federation:
        yield federation


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_anything_is_answered_and_the_others_are_served(federation: Federation) -> None:
    registry, brought = federation.coordinator.registry, []
    waiting = threading.Thread(target=lambda: brought.append(registry.gather(KEY, LIMIT)))
    waiting.start()
    with ExitStack() as stack:
        berlin = stack.enter_context(joined_by_force(federation, "berlin"))
        paris = stack.enter_context(joined_by_force(federation, "paris"))
        answer(berlin, MEET, [b""])
        before = peak_bytes()

        @settings(max_examples=150)
        @given(st.sampled_from([JOIN, MEET, FETCH]), streams)
        def fuzz(method: str, parts: list[bytes]) -> None:
            status, reason = answer(berlin, method, parts, timeout=0.5)
            # It waits for a meeting that is not open yet, or its question is answered.
            assert status in ANSWERS | {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.OK}, reason
            assert method != JOIN or status in ANSWERS

        fuzz()
        assert peak_bytes() - before < MAX_GROWTH
        assert not registry.meetings[KEY].brought
        calls = [channel.stream_stream(MEET)(iter(parts_of(HONEST))) for channel in (berlin, paris)]
        waiting.join(20)
        assert calls and torch.equal(brought[0]["paris"].tensors["vector/delta"], DELTA)


def test_what_drips_keeps_its_own_streams_alone(federation: Federation) -> None:
    never = threading.Event()

    def drip() -> Iterator[bytes]:
        first, rest = parts_of(HONEST)
        yield first
        for byte in rest:
            if never.wait(0.5):
                return
            yield bytes([byte])

    with federation.channel(credentials(federation.certs, "berlin")) as berlin, ExitStack() as stack:
        stack.callback(never.set)
        calls = [berlin.stream_stream(MEET)(drip()) for _ in range(20)]
        paris = stack.enter_context(joined_by_force(federation, "paris"))
        assert answer(paris, FETCH, [first_part({"session": "1", "rounds": 0}, {})])[0] == grpc.StatusCode.OK
        for call in calls:
            call.cancel()
