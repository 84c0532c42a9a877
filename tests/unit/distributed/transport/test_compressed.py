"""CompressedAllReduce: nothing is lost, all ranks get the same bits, and the counted bytes are those sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from trainer.algorithms.round import Round
from trainer.distributed.compression import Cast, Codec, Int4, Int8, TopK
from trainer.distributed.topology import distributed
from trainer.distributed.transport import CompressedAllReduce

CODECS: dict[str, Codec] = {
    "bf16": Cast("bfloat16"),
    "fp16": Cast("float16"),
    "int8": Int8(64),
    "int4": Int4(64),
    "topk": TopK(0.25),
}
# The largest relative error, by the norm, of a vector of normal numbers.
MAX_ERROR = {"bf16": 2**-8, "fp16": 2**-11, "int8": 0.02, "int4": 0.3, "topk": 0.8}
LENGTH, ROUNDS = 1008, 3
CHUNK_SIZE = 100  # so that there are several chunks

every_codec = pytest.mark.parametrize("codec", CODECS)


def vector_of(silo: int, round: int, dtype: torch.dtype = torch.float32, length: int = LENGTH) -> Tensor:
    """Return a silo's vector of a round."""
    generator = torch.Generator().manual_seed(100 * round + silo)
    return torch.randn(length, generator=generator, dtype=torch.float64).to(dtype)


def total_of(transport: CompressedAllReduce, vector: Tensor, round: int, name: str = "delta") -> Tensor:
    """Return the sum of a round, gathered in the silo."""
    transport.start_round(Round(round, 0, ()).seed_for)
    for part, total in transport.all_reduce_async(vector, name):
        vector[part] = total
    return transport.all_gather(vector)


def unsent(states: Sequence[dict[str, Any]], name: str = "delta") -> Tensor:
    """Return the sum of the residuals of these ranks."""
    left = torch.zeros(LENGTH, dtype=torch.float64)
    for state in states:
        for pieces in state.get(name, {}).values():
            for start, piece in pieces.items():
                left[int(start) : int(start) + len(piece)] += piece
    return left


Outcome = tuple[list[Tensor], dict[str, Any], int]


def rounds_of(
    sizes: list[int], codec: str, chunk_size: int = CHUNK_SIZE, rounds: int = ROUNDS, dtype: torch.dtype = torch.float32
) -> Outcome:
    """Return the sums of some rounds on this rank, its state, and the bytes."""
    with patch("trainer.distributed.transport.base.CHUNK_SIZE", chunk_size), distributed(sizes) as topology:
        transport = CompressedAllReduce(topology, CODECS[codec])
        totals = [total_of(transport, vector_of(topology.silo, round, dtype), round) for round in range(rounds)]
        return totals, transport.state_dict(), transport.bytes_sent


def plain_sums(silos: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the sums without compression."""
    sums = ([vector_of(silo, round, dtype) for silo in range(silos)] for round in range(ROUNDS))
    return [torch.stack(vectors).double().sum(0) for vectors in sums]


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [3, 1], [1, 1, 1], [2, 1, 1], [1, 1, 1, 1]], ids=str)
@every_codec
@pytest.mark.quick_rows(9)
def test_sums_and_residuals_add_up_to_the_vectors(ranks, codec: str, sizes: list[int]):
    """The same bits on all ranks; the error of the first sum is within the codec's bound."""
    outcomes: list[Outcome] = ranks(sum(sizes)).run(rounds_of, sizes, codec)
    totals = outcomes[0][0]
    for others, _, _ in outcomes:
        assert all(map(torch.equal, others, totals))
    plain = plain_sums(len(sizes))
    left = unsent([state for _, state, _ in outcomes])
    torch.testing.assert_close(torch.stack(totals).double().sum(0) + left, sum(plain), rtol=0, atol=1e-5)
    steps = 1 if len(sizes) < 4 else 2  # the sums are encoded again
    norms = sum(float(vector_of(silo, 0).norm()) for silo in range(len(sizes)))
    assert 0 < float((totals[0] - plain[0]).norm()) < steps * MAX_ERROR[codec] * norms


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1, 1]], ids=str)
@every_codec
@pytest.mark.quick_rows(5)
def test_float64_vectors_add_up_in_float64(ranks, codec: str, sizes: list[int]):
    outcomes: list[Outcome] = ranks(sum(sizes)).run(rounds_of, sizes, codec, CHUNK_SIZE, ROUNDS, torch.float64)
    left = unsent([state for _, state, _ in outcomes])
    given = sum(plain_sums(len(sizes), torch.float64))
    torch.testing.assert_close(torch.stack(outcomes[0][0]).sum(0) + left, given, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "codec", "sent"),
    [
        # Each of S silos sends its bytes to S - 1 others.
        ([1, 1], "int8", 2 * 1 * 16 * (4 + 64)),
        ([1, 1, 1], "bf16", 3 * 2 * 2 * 1008),
        ([2, 2], "int4", 2 * 1 * 2 * 8 * (4 + 32)),  # two shards of 504 numbers, each 8 blocks
        ([3, 1], "topk", 2 * 1 * 8 * 252),
        # A share of 252 numbers to each of the others, and its sum to each of the others.
        ([1, 1, 1, 1], "int8", 4 * 3 * 2 * 4 * (4 + 64)),
    ],
)
def test_bytes_sent_are_counted(ranks, sizes: list[int], codec: str, sent: int):
    for _, _, counted in ranks(sum(sizes)).run(rounds_of, sizes, codec, 1 << 22):
        assert counted == ROUNDS * sent


def two_kinds(sizes: list[int]) -> list[Tensor]:
    """Sum two vectors that are pending at the same time, as with SCAFFOLD, and each in a separate round."""
    with distributed(sizes) as topology:
        together, apart = CompressedAllReduce(topology, CODECS["int4"]), CompressedAllReduce(topology, CODECS["int4"])
        vectors = [vector_of(topology.silo, round) for round in range(2)]
        expected = [total_of(apart, vector.clone(), 0, name) for vector, name in zip(vectors, "ab", strict=True)]
        together.start_round(Round(0, 0, ()).seed_for)
        flights = [together.all_reduce_async(vector, name) for vector, name in zip(vectors, "ab", strict=True)]
        for vector, flight in zip(vectors[::-1], flights[::-1], strict=True):
            for part, total in flight:
                vector[part] = total
        return [together.all_gather(vector) for vector in vectors] + expected


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1, 1]], ids=str)
def test_vectors_of_two_names_do_not_mix(ranks, sizes: list[int]):
    first, second, first_alone, second_alone = ranks(sum(sizes)).run(two_kinds, sizes)[0]
    assert torch.equal(first, first_alone) and torch.equal(second, second_alone)


def short_vectors(sizes: list[int], length: int) -> Tensor:
    with distributed(sizes) as topology:
        transport = CompressedAllReduce(topology, CODECS["int8"])
        return total_of(transport, torch.ones(length), 0)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1, 1]], ids=str)
def test_shares_may_be_empty(ranks, sizes: list[int], length: int):
    """There are fewer numbers than silos. A one is decoded as a one."""
    for total in ranks(sum(sizes)).run(short_vectors, sizes, length):
        torch.testing.assert_close(total, torch.full((length,), float(len(sizes))))


States = dict[int, dict[str, Any]]  # by silo, of all its ranks


def merged(sizes: list[int], states: Sequence[dict[str, Any]]) -> States:
    """Return the states of all ranks, as in a checkpoint."""
    by_silo: States = {}
    silos = [silo for silo, size in enumerate(sizes) for _ in range(size)]
    for silo, state in zip(silos, states, strict=True):
        by_silo[silo] = grown(by_silo.get(silo, {}), state)
    return by_silo


def grown(tree: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a tree with the leaves of both trees."""
    return tree | {
        name: grown(tree.get(name, {}), value) if isinstance(value, dict) else value for name, value in other.items()
    }


def resumed(sizes: list[int], states: States, before: list[int], codec: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's residuals with the loaded states, the sum of the next round, and the residuals after it."""
    with patch("trainer.distributed.transport.base.CHUNK_SIZE", CHUNK_SIZE), distributed(sizes) as topology:
        transport = CompressedAllReduce(topology, CODECS[codec])
        own = [state for silo, state in states.items() if silo % len(sizes) == topology.silo]
        transport.load_state_dicts(own, transport.chunks(LENGTH), before == sizes)
        taken = unsent([transport.state_dict()])
        total = total_of(transport, vector_of(topology.silo, ROUNDS), ROUNDS)
        return taken, total, unsent([transport.state_dict()])


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [3, 1], [1, 1, 1, 1]], ids=str)
@every_codec
@pytest.mark.quick_rows(4)
def test_a_resumed_transport_has_the_same_bits(ranks, codec: str, sizes: list[int]):
    """Saved after three rounds and loaded in the same world, it continues like an uninterrupted transport."""
    pool = ranks(sum(sizes))
    states = merged(sizes, [state for _, state, _ in pool.run(rounds_of, sizes, codec)])
    outcomes = pool.run(resumed, sizes, states, sizes, codec)
    through: list[Outcome] = pool.run(rounds_of, sizes, codec, CHUNK_SIZE, ROUNDS + 1)
    for (_, total, left), (totals, expected, _) in zip(outcomes, through, strict=True):
        assert torch.equal(total, totals[-1])
        assert torch.equal(left, unsent([expected]))


@pytest.mark.parametrize("after", [[1], [4], [1, 1], [2, 2], [3, 1], [1, 1, 1], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("before", [[2, 2], [3, 1], [1, 1, 1, 1]], ids=str)
@pytest.mark.quick_rows(4)
def test_nothing_is_lost_in_another_world(ranks, before: list[int], after: list[int]):
    """The residuals are distributed to other silos and replicas, number by number, which then send them."""
    saved = [state for _, state, _ in ranks(sum(before)).run(rounds_of, before, "int8")]
    outcomes = ranks(sum(after)).run(resumed, after, merged(before, saved), before, "int8")
    taken, left = (torch.stack([outcome[index] for outcome in outcomes]).sum(0) for index in (0, 2))
    torch.testing.assert_close(taken, unsent(saved), rtol=0, atol=1e-6)
    given = torch.stack([vector_of(silo, ROUNDS) for silo in range(len(after))]).double().sum(0)
    torch.testing.assert_close(outcomes[0][1].double() + left, given + taken, rtol=0, atol=1e-5)
    assert bool(left.any()) == (len(after) > 1)
