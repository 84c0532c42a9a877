"""AllReduce: the sum over silos by shards and chunks, with the same bits on every rank."""

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


def topology_of(rank: int, sizes: tuple[int, ...]) -> Topology:
    """Return the topology of a rank, without process groups."""
    silo = next(silo for silo in range(len(sizes)) if rank < sum(sizes[: silo + 1]))
    return Topology(rank, sum(sizes), silo, rank - sum(sizes[:silo]), sizes, torch.device("cpu"), None, None)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_shards_of_equal_silos_are_the_whole_vector(silos: int, replicas: int, width: int):
    """Each replica of a silo has a shard, the same in every silo."""
    sizes = (replicas,) * silos
    for silo in range(silos):
        topologies = [topology_of(silo * replicas + replica, sizes) for replica in range(replicas)]
        shards = [range(width * replicas)[one.shard_of(width * replicas)] for one in topologies]
        assert [len(shard) for shard in shards] == [width] * replicas
        assert [index for shard in shards for index in shard] == list(range(width * replicas))


def test_leaders_of_unequal_silos_have_the_whole_vector():
    shards = [topology_of(rank, (3, 1)).shard_of(16) for rank in range(4)]
    assert [shard.stop - shard.start for shard in shards] == [16, 0, 0, 16]


def sum_by_chunks(sizes: list[int], length: int, chunk_size: int) -> tuple[torch.Tensor, float, int]:
    """Return the sum of all silos' vectors, its squared norm summed over shards, and the bytes between silos."""
    with patch("trainer.distributed.transport.base.CHUNK_SIZE", chunk_size), distributed(sizes) as topology:
        transport, vector = AllReduce(topology), vector_of(topology.silo, length)
        squares = 0.0
        for span, total in transport.all_reduce_async(vector.clone(), "delta"):
            vector[span] = total
            squares += float(total.double().square().sum())
        return transport.all_gather(vector), transport.all_reduce_in_silo(squares), transport.bytes_sent


@pytest.mark.parametrize("chunk_size", [1 << 22, 100], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_sum_of_all_silos_is_on_every_rank(ranks, sizes: list[int], chunk_size: int):
    """For silos of any sizes, in one chunk or several, it is the sum of numpy, with the same bits on all ranks."""
    outcomes = ranks(sum(sizes)).run(sum_by_chunks, sizes, 1008, chunk_size)
    expected = np.sum([vector_of(silo, 1008).double().numpy() for silo in range(len(sizes))], 0)
    for total, squares, sent in outcomes:
        np.testing.assert_allclose(total, expected, atol=1e-6)
        assert torch.equal(total, outcomes[0][0])
        assert squares == pytest.approx(float(np.square(expected).sum()), rel=1e-5)
        assert sent == 2 * (len(sizes) - 1) * 1008 * 4


def sum_both_ways(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum by shards, and that of one all-reduce between leaders and a broadcast."""
    with distributed(sizes) as topology:
        vector = vector_of(topology.silo, 1008)
        plain = vector.clone()
        if topology.is_leader:
            dist.all_reduce(plain, group=topology.inter_silo_group)
        dist.broadcast(plain, src=topology.leader, group=topology.silo_group)
        transport = AllReduce(topology)
        for span, total in transport.all_reduce_async(vector, "delta"):
            vector[span] = total
        return transport.all_gather(vector), plain


def test_shards_of_two_silos_have_the_bits_of_the_whole_vector(ranks):
    """Two numbers can only be summed in one order."""
    for sharded, plain in ranks(4).run(sum_both_ways, [2, 2]):
        assert torch.equal(sharded, plain)


def backends_of(backend: str) -> tuple[str, str]:
    """Return the backends of the group inside the silo, and of that between silos."""
    with distributed(2, device="cpu", inter_silo_backend=backend) as topology:
        total = [total for _, total in AllReduce(topology).all_reduce_async(torch.ones(16), "delta")]
        assert torch.equal(total[0], torch.full((16,), 2.0))
        return dist.get_backend(topology.silo_group), dist.get_backend(topology.inter_silo_group)


def test_gloo_can_be_chosen_between_silos(ranks):
    assert ranks(2).run(backends_of, "gloo") == [("gloo", "gloo")] * 2


def bytes_of_zeros(length: int) -> int:
    with distributed(2) as topology:
        transport = AllReduce(topology)
        assert list(transport.all_reduce_async(torch.zeros(length), "delta")) == []
        return transport.bytes_sent


def test_an_empty_vector_does_not_travel(ranks):
    assert ranks(2).run(bytes_of_zeros, 0) == [0, 0]
