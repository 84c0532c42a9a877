"""The collectives, on real ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.distributed import collectives
from trainer.distributed.topology import distributed


def texts_of(texts: list[str]) -> tuple[list[str], str]:
    with distributed() as topology:
        return collectives.all_gather_texts(texts[topology.rank]), collectives.broadcast_text(texts[topology.rank])


@pytest.mark.parametrize(
    "texts", [["", ""], ["", "one"], ["a much longer text\nof two lines", ""], ["grün, 猫, 🐈", "x" * 70000]]
)
def test_texts_arrive_as_they_were(ranks, texts: list[str]):
    """Texts of any length and script are gathered in rank order; the broadcast one is that of rank 0."""
    assert ranks(2).run(texts_of, texts) == [(texts, texts[0])] * 2


def header_of(rank: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return two scalars, and tables, some of them empty."""
    generator = torch.Generator().manual_seed(rank)
    shapes = {"table": (3, 2), "empty": (0,), "empty_table": (0, 3), "vector": (4,)}
    tables = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {"weight": 2.0**40 + rank, "steps": rank}, tables


def sum_headers() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    with distributed() as topology:
        return collectives.all_reduce_scalars(*header_of(topology.rank))


def test_scalars_and_tables_are_summed_by_entry(ranks):
    """Scalars are exact in float64, tables keep their shapes, and sums are those of numpy on all ranks."""
    outcomes = ranks(3).run(sum_headers)
    for scalars, tables in outcomes:
        assert scalars == {"weight": 3 * 2.0**40 + 3, "steps": 3}
        assert list(tables) == list(header_of(0)[1])
        for name, total in tables.items():
            expected = np.sum([header_of(rank)[1][name].numpy() for rank in range(3)], 0)
            assert total.shape == expected.shape and total.dtype == torch.float64
            np.testing.assert_allclose(total, expected, rtol=1e-15, atol=1e-15)
            assert torch.equal(total, outcomes[0][1][name])


def sum_of_nothing() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    with distributed():
        return collectives.all_reduce_scalars({}, {"table": torch.ones(2, dtype=torch.float64)})


def test_tables_are_summed_without_scalars(ranks):
    for scalars, tables in ranks(2).run(sum_of_nothing):
        assert scalars == {} and tables["table"].tolist() == [2.0, 2.0]


def rows_and_maxima() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with distributed() as topology:
        row = torch.tensor([topology.rank, -(1 << 62) + topology.rank])
        broadcast = collectives.broadcast(torch.full((2,), float(topology.rank + 5)))
        return (
            collectives.all_gather_rows(row),
            collectives.all_reduce_max(torch.tensor([topology.rank, -topology.rank])),
            broadcast,
        )


def test_rows_maxima_and_broadcasts(ranks):
    """Rows are in rank order, in 64 bits; the maximum is elementwise; the broadcast is from rank 0."""
    for rows, maxima, broadcast in ranks(3).run(rows_and_maxima):
        assert rows.tolist() == [[rank, -(1 << 62) + rank] for rank in range(3)]
        assert maxima.tolist() == [2, 0]
        assert broadcast.tolist() == [5.0, 5.0]


def vector_of(silo: int) -> torch.Tensor:
    return torch.randn(1000, generator=torch.Generator().manual_seed(silo))


def sum_silos(silos: list[int]) -> torch.Tensor:
    with distributed(silos) as topology:
        return collectives.all_reduce_between_silos(vector_of(topology.silo), topology)


@pytest.mark.parametrize("silos", [[3, 1], [1, 1, 2], [1, 1, 1, 1], [4]])
def test_silos_count_once_whatever_their_ranks(ranks, silos: list[int]):
    """The sum is over silos, not over ranks, with the same bits on every rank."""
    outcomes = ranks(4).run(sum_silos, silos)
    expected = np.sum([vector_of(silo).double().numpy() for silo in range(len(silos))], 0)
    np.testing.assert_allclose(outcomes[0], expected, atol=1e-6)
    assert all(torch.equal(outcomes[0], other) for other in outcomes)


def test_other_timeouts_are_not_those_of_collectives():
    """An example is that of a data loader, whose traceback is shown."""
    assert not collectives.has_timed_out(RuntimeError("DataLoader timed out after 5 seconds"))
    assert collectives.has_timed_out(RuntimeError("[gloo/transport/tcp] Timed out waiting 5000ms for recv operation"))


def test_a_lost_peer_is_distinguished_from_other_failures():
    """It is recognised by the message of gloo for a broken connection."""
    assert collectives.has_lost_peers(
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]")
    )
    assert not collectives.has_lost_peers(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not collectives.has_lost_peers(ValueError("Connection closed by peer"))
