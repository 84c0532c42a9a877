"""Wires: the sum over silos, slice by slice and part by part, the same bits on every rank."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from trainer.distributed.topology import Topology, distributed
from trainer.distributed.transport import AllReduce

SIZES = [[1, 1], [2, 2], [3, 1], [2, 1, 1], [1, 1, 1, 1], [4]]


def vector_of(silo: int, length: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(silo))


def place(rank: int, sizes: tuple[int, ...]) -> Topology:
    """The place of a rank in a world that is not there."""
    silo = next(silo for silo in range(len(sizes)) if rank < sum(sizes[: silo + 1]))
    return Topology(rank, sum(sizes), silo, rank - sum(sizes[:silo]), sizes, torch.device("cpu"), None, None)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_slices_of_equal_silos_are_the_whole(silos: int, replicas: int, width: int):
    """Each replica of a silo has one of them, the same in every silo."""
    sizes = (replicas,) * silos
    for silo in range(silos):
        places = [place(silo * replicas + replica, sizes) for replica in range(replicas)]
        slices = [range(width * replicas)[one.shard_of(width * replicas)] for one in places]
        assert [len(own) for own in slices] == [width] * replicas
        assert [index for own in slices for index in own] == list(range(width * replicas))


def test_leaders_of_unequal_silos_have_it_all():
    slices = [place(rank, (3, 1)).shard_of(16) for rank in range(4)]
    assert [s.stop - s.start for s in slices] == [16, 0, 0, 16]


def sum_by_parts(sizes: list[int], length: int, part: int) -> tuple[torch.Tensor, float, int]:
    """The joined sum of all silos' vectors, its squared norm added up over slices, and the bytes between silos."""
    with patch("trainer.distributed.transport.base.CHUNK_SIZE", part), distributed(sizes) as topology:
        wire, vector = AllReduce(topology), vector_of(topology.silo, length)
        squares = 0.0
        for at, total in wire.all_reduce_async(vector.clone(), "delta"):
            vector[at] = total
            squares += float(total.double().square().sum())
        return wire.all_gather(vector), wire.sum_over_shards(squares), wire.bytes_sent


@pytest.mark.parametrize("part", [1 << 22, 100], ids=["whole", "parts"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_sum_of_all_silos_is_on_every_rank(ranks, sizes: list[int], part: int):
    """Whatever the silos' sizes, in one part or in several: numpy's sum, and the same bits everywhere."""
    outcomes = ranks(sum(sizes)).run(sum_by_parts, sizes, 1008, part)
    expected = np.sum([vector_of(silo, 1008).double().numpy() for silo in range(len(sizes))], 0)
    for total, squares, sent in outcomes:
        np.testing.assert_allclose(total, expected, atol=1e-6)
        assert torch.equal(total, outcomes[0][0])
        assert squares == pytest.approx(float(np.square(expected).sum()), rel=1e-5)
        assert sent == 2 * (len(sizes) - 1) * 1008 * 4


def sum_both_ways(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the slices give, and what one all-reduce between leaders and a broadcast give."""
    with distributed(sizes) as topology:
        vector = vector_of(topology.silo, 1008)
        plain = vector.clone()
        if topology.is_leader:
            dist.all_reduce(plain, group=topology.inter_silo_group)
        dist.broadcast(plain, src=topology.leader, group=topology.silo_group)
        wire = AllReduce(topology)
        for at, total in wire.all_reduce_async(vector, "delta"):
            vector[at] = total
        return wire.all_gather(vector), plain


def test_slices_of_two_silos_have_the_bits_of_the_whole(ranks):
    """With two silos there is one order in which to add."""
    for sliced, plain in ranks(4).run(sum_both_ways, [2, 2]):
        assert torch.equal(sliced, plain)


def backends_of(wish: str) -> tuple[str, str]:
    """Those of the group inside the silo, and of the one between silos."""
    with distributed(2, device="cpu", inter_silo_backend=wish) as topology:
        total = [total for _, total in AllReduce(topology).all_reduce_async(torch.ones(16), "delta")]
        assert torch.equal(total[0], torch.full((16,), 2.0))
        return dist.get_backend(topology.silo_group), dist.get_backend(topology.inter_silo_group)


def test_gloo_can_be_asked_for_between_silos(ranks):
    assert ranks(2).run(backends_of, "gloo") == [("gloo", "gloo")] * 2


def nothing_travels(length: int) -> int:
    with distributed(2) as topology:
        wire = AllReduce(topology)
        assert list(wire.all_reduce_async(torch.zeros(length), "delta")) == []
        return wire.bytes_sent


def test_an_empty_vector_does_not_travel(ranks):
    assert ranks(2).run(nothing_travels, 0) == [0, 0]
