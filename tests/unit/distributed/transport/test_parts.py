"""Transports between silos that hold a model in parts: each part travels by itself, and norms are of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.algorithms.robust import Krum, Median
from trainer.algorithms.round import Round
from trainer.distributed import collectives
from trainer.distributed.compression import Int4, Int8, PowerSGD, TopK, Uncompressed, UpdateCompression
from trainer.distributed.topology import Topology, distributed
from trainer.distributed.transport import AllReduce, make_transport

LENGTH, ROUNDS, PARTS = 1008, 3, 2
LAYOUT = [(0, torch.Size((20, 30))), (600, torch.Size((20,))), (624, torch.Size((12, 32)))]

CHOICES: dict[str, UpdateCompression] = {
    "as they are": Uncompressed(),
    "int8": Int8(8),
    "int4": Int4(8),
    "topk": TopK(0.1),
    "powersgd": PowerSGD(2),
}


def part_of(silo: int, part: int, round: int = 0, length: int = LENGTH) -> Tensor:
    """Return the numbers that a silo has of a part."""
    return torch.randn(length, generator=torch.Generator().manual_seed(100 * round + 10 * part + silo))


def sums_of(topology: Topology, compression: UpdateCompression, part: int) -> tuple[list[Tensor], int]:
    """Return the sums of some rounds over the silos, and the bytes."""
    transport, totals = make_transport(topology, compression, LAYOUT), []
    for round in range(ROUNDS):
        vector = part_of(topology.silo, part, round)
        transport.start_round(Round(round, 0, ()).seed_for)
        for span, total in transport.all_reduce_async(vector, "delta"):
            vector[span] = total
        totals.append(transport.all_gather(vector))
    return totals, transport.bytes_sent


def sums_in_parts(silos: list[int], compression: UpdateCompression) -> tuple[int, list[Tensor], int]:
    with distributed(silos, device="cpu", shard=PARTS) as topology:
        return topology.part, *sums_of(topology, compression, topology.part)


def sums_of_part(compression: UpdateCompression, part: int) -> tuple[list[Tensor], int]:
    with distributed(2, device="cpu") as topology:
        return sums_of(topology, compression, part)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.quick_rows(3)
def test_a_part_travels_by_itself(ranks: Any, choice: str):
    """Its sums are those of silos that have nothing else; the bytes are those of both parts."""
    compression = CHOICES[choice]
    alone = [ranks(2).run(sums_of_part, compression, part)[0] for part in range(PARTS)]
    for part, totals, sent in ranks(4).run(sums_in_parts, [2, 2], compression):
        assert sent == sum(bytes for _, bytes in alone)
        for ours, theirs in zip(totals, alone[part][0], strict=True):
            if part == 0 or choice != "int4":  # which rounds at random, each part by other numbers
                assert torch.equal(ours, theirs)
            else:
                assert not torch.equal(ours, theirs)
                torch.testing.assert_close(ours, theirs, atol=2.0, rtol=0)


@pytest.mark.long
def test_silos_may_have_different_numbers_of_copies(ranks: Any):
    """Of four ranks and of two: two copies and one."""
    alone = [ranks(2).run(sums_of_part, Uncompressed(), part)[0][0] for part in range(PARTS)]
    for part, totals, _ in ranks(6).run(sums_in_parts, [4, 2], Uncompressed()):
        assert all(map(torch.equal, totals, alone[part]))


def rows_of(silo: int, part: int) -> Tensor:
    """Return the updates of three clients of a silo."""
    return torch.stack([part_of(silo, part, client) for client in range(3)]).double()


def combined(silos: list[int], rule: Any, shard: int) -> tuple[int, Tensor, int]:
    with distributed(silos, device="cpu", shard=shard) as topology:
        transport = AllReduce(topology)
        parts = [topology.part] if shard > 1 else range(PARTS)
        rows = torch.cat([rows_of(topology.silo, part) for part in parts], 1)
        return topology.part, transport.all_reduce_columns(rows, rule.combine), transport.bytes_sent


@pytest.mark.parametrize("silos", [[2, 2], [4]], ids=str)
@pytest.mark.parametrize("rule", [Median(), Krum(0, 2)], ids=["median", "krum"])
def test_rules_see_whole_updates(ranks: Any, rule: Any, silos: list[int]):
    """Krum's distances are sums over silos and parts."""
    _, whole, sent = ranks(len(silos)).run(combined, [1] * len(silos), rule, 1)[0]
    for part, row, bytes in ranks(4).run(combined, silos, rule, PARTS):
        assert torch.equal(row, whole.chunk(PARTS)[part])
        assert bytes == sent


def norms() -> tuple[float, float, Tensor]:
    with distributed(2, device="cpu", shard=PARTS) as topology:
        transport = AllReduce(topology)
        norm = float(torch.linalg.vector_norm(part_of(0, topology.part).double()))
        broken = math.nan if topology.part == 1 else norm
        personal = collectives.all_reduce_between_silos(part_of(topology.silo, topology.part), topology)
        return transport.norm_over_parts(norm), transport.norm_over_parts(broken), personal


def test_norms_are_of_all_parts(ranks: Any):
    """Also one that is no number is known to all ranks. Small vectors are summed by part."""
    whole = torch.cat([part_of(0, part) for part in range(PARTS)]).double()
    for rank, (norm, broken, personal) in enumerate(ranks(4).run(norms)):
        assert norm == pytest.approx(float(torch.linalg.vector_norm(whole)), rel=1e-15)
        assert math.isnan(broken)
        assert torch.equal(personal, part_of(0, rank % 2) + part_of(1, rank % 2))


def sum_of_ragged(length: int, make: Callable[[Topology], Any]) -> tuple[Tensor, int]:
    with distributed(2, device="cpu") as topology:
        transport, vector = make(topology), part_of(topology.silo, 0, length=length)
        for span, total in transport.all_reduce_async(vector, "delta"):
            vector[span] = total
        return transport.all_gather(vector), transport.bytes_sent


@pytest.mark.parametrize("length", [1, 7, 33])
def test_shards_of_any_length_are_the_whole_vector(ranks: Any, length: int):
    """Of two replicas the second may have less, or nothing."""
    for total, sent in ranks(4).run(sum_of_ragged, length, AllReduce):
        assert torch.equal(total, part_of(0, 0, length=length) + part_of(1, 0, length=length))
        assert sent == 2 * length * 4
