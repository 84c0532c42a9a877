"""PowerSGDAllReduce: matrices of small rank are exact, nothing is lost, and all ranks get the same bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.distributed.transport.test_compressed import merged, unsent
from trainer.algorithms.round import Round
from trainer.distributed.topology import distributed
from trainer.distributed.transport import PowerSGDAllReduce
from trainer.distributed.transport.low_rank import MatrixRows, matrices_in_chunk, multiply

# A layer's weight and bias, twice, in a vector of 1008 numbers.
SHAPES = {0: (20, 30), 600: (20,), 624: (12, 4, 8)}
LENGTH, RANK, ROUNDS = 1008, 2, 3
PLACES = [(start, torch.Size(shape)) for start, shape in SHAPES.items()]

every_world = pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [3, 1], [1, 1, 1], [1, 1, 1, 1]], ids=str)


def views(vector: Tensor) -> list[Tensor]:
    """Return the parameters of a vector, as views."""
    return [vector[start : start + shape.numel()].view(shape) for start, shape in PLACES]


def vector_of(silo: int, round: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 * round + silo)
    return torch.randn(LENGTH, generator=generator, dtype=torch.float64).to(dtype)


def total_of(transport: PowerSGDAllReduce, vector: Tensor, round: int) -> Tensor:
    """Return the sum of a round, gathered in the silo."""
    transport.start_round(Round(round, 0, ()).seed_for)
    for part, total in transport.all_reduce_async(vector, "delta"):
        vector[part] = total
    return transport.all_gather(vector)


def rounds_of(
    sizes: list[int], chunk_size: int, rounds: int = ROUNDS, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], dict[str, Any], int]:
    """Return the sums of some rounds on this rank, its state, and the bytes."""
    with patch("trainer.distributed.transport.base.CHUNK_SIZE", chunk_size), distributed(sizes) as topology:
        transport = PowerSGDAllReduce(topology, RANK, PLACES)
        totals = [total_of(transport, vector_of(topology.silo, round, dtype), round) for round in range(rounds)]
        return totals, transport.state_dict(), transport.bytes_sent


def given_to(silos: int, rounds: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the plain sum of all silos' vectors over some rounds."""
    return torch.stack([vector_of(silo, round, dtype) for silo in range(silos) for round in rounds]).double().sum(0)


@pytest.mark.parametrize(
    ("chunk_size", "dtype", "tolerance"),
    [(1 << 22, torch.float64, 1e-10), (200, torch.float32, 1e-4)],
    ids=["one chunk", "chunks"],
)
@every_world
def test_sums_and_residuals_add_up_to_the_vectors(
    ranks, sizes: list[int], chunk_size: int, dtype: torch.dtype, tolerance: float
):
    """All ranks have the same bits; vectors are exact, and the sums of matrices have this rank."""
    outcomes = ranks(sum(sizes)).run(rounds_of, sizes, chunk_size, ROUNDS, dtype)
    totals = outcomes[0][0]
    for others, _, _ in outcomes:
        assert all(map(torch.equal, others, totals))
    left = unsent([state["residuals"] for _, state, _ in outcomes])
    plain = (
        torch.stack([vector_of(silo, r, dtype) for silo in range(len(sizes)) for r in range(ROUNDS)]).double().sum(0)
    )
    torch.testing.assert_close(torch.stack(totals).double().sum(0) + left, plain, rtol=0, atol=tolerance)
    assert not left[600:624].any() and left[:600].any() and left[624:1008].any()
    if chunk_size > LENGTH and sizes in ([1, 1], [3, 1]):
        assert [int(torch.linalg.matrix_rank(view.flatten(1))) for view in views(totals[0])[::2]] == [RANK, RANK]


def thin_sum(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Return the sum of matrices whose rows are all in one plane, and the residuals."""
    with distributed(sizes) as topology:
        transport = PowerSGDAllReduce(topology, RANK, PLACES)
        total = total_of(transport, thin_vector(topology.silo), 0)
        return total, unsent([transport.state_dict()["residuals"]])


def thin_vector(silo: int) -> Tensor:
    vector = torch.zeros(LENGTH, dtype=torch.float64)
    for view in views(vector)[::2]:
        plane = torch.randn(RANK, view[0].numel(), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        own = torch.randn(len(view), RANK, generator=torch.Generator().manual_seed(silo), dtype=torch.float64)
        view.flatten(1).copy_(own @ plane)
    return vector


@every_world
def test_matrices_of_the_rank_are_exact(ranks, sizes: list[int]):
    """The span of their columns is found in the first round, from a random Q."""
    expected = torch.stack([thin_vector(silo) for silo in range(len(sizes))]).sum(0)
    outcomes = ranks(sum(sizes)).run(thin_sum, sizes)
    torch.testing.assert_close(outcomes[0][0], expected, rtol=0, atol=1e-12)


def repeated(rounds: int) -> list[float]:
    """Return the errors relative to the best approximation of that rank, over rounds with one vector."""
    with distributed([1, 1]) as topology:
        transport, best = PowerSGDAllReduce(topology, RANK, PLACES), 2 * vector_of(0, 0, torch.float64)
        weight = views(best)[0]
        u, s, v = torch.linalg.svd(weight)
        weight.copy_(u[:, :RANK] * s[:RANK] @ v[:RANK])
        errors = []
        for round in range(rounds):
            total = total_of(transport, vector_of(0, 0, torch.float64), round)
            transport.residuals.residuals.clear()
            errors.append(float((views(total)[0] - weight).norm() / weight.norm()))
        return errors


def test_q_of_one_round_starts_the_next(ranks):
    """Power iteration converges to the best approximation of that rank: Vogels et al. 2019, theorem 1."""
    errors = ranks(2).run(repeated, 60)[0]
    assert errors[0] > 0.3 and errors[-1] < 0.02 and errors[30] < errors[3]


def test_bytes_sent_are_counted(ranks):
    """All-reduces of P with uncompressed values, and of Q, send 2 (S - 1) times each; silo 0 sends P once more."""
    for _, _, counted in ranks(3).run(rounds_of, [1, 1, 1], 1 << 22):
        columns, rows, rest = RANK * (20 + 12), RANK * (30 + 32), 24
        assert counted == ROUNDS * 2 * 4 * (2 * (columns + rest) + columns + 2 * rows)


def resumed(sizes: list[int], states: dict[int, Any], before: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's residuals with the loaded states, the sum of the next round, and the residuals after it."""
    with patch("trainer.distributed.transport.base.CHUNK_SIZE", 200), distributed(sizes) as topology:
        transport = PowerSGDAllReduce(topology, RANK, PLACES)
        own = [state for silo, state in states.items() if silo % len(sizes) == topology.silo]
        transport.load_state_dicts(own, transport.chunks(LENGTH), before == sizes)
        taken = unsent([transport.state_dict()["residuals"]])
        total = total_of(transport, vector_of(topology.silo, ROUNDS), ROUNDS)
        return taken, total, unsent([transport.state_dict()["residuals"]])


def saved_by(ranks: Any, sizes: list[int]) -> tuple[dict[int, Any], Tensor]:
    """Return the states of three rounds, as in a checkpoint, and the sum of all residuals."""
    states = [state for _, state, _ in ranks(sum(sizes)).run(rounds_of, sizes, 200)]
    return merged(sizes, states), unsent([state["residuals"] for state in states])


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [3, 1]], ids=str)
def test_a_resumed_transport_has_the_same_bits(ranks, sizes: list[int]):
    states, _ = saved_by(ranks, sizes)
    outcomes = ranks(sum(sizes)).run(resumed, sizes, states, sizes)
    through = ranks(sum(sizes)).run(rounds_of, sizes, 200, ROUNDS + 1)
    for (_, total, left), (totals, state, _) in zip(outcomes, through, strict=True):
        assert torch.equal(total, totals[-1])
        assert torch.equal(left, unsent([state["residuals"]]))


@pytest.mark.parametrize("after", [[1], [1, 1], [3, 1], [1, 1, 1, 1]], ids=str)
def test_nothing_is_lost_in_another_world(ranks, after: list[int]):
    states, saved = saved_by(ranks, [2, 2])
    outcomes = ranks(sum(after)).run(resumed, after, states, [2, 2])
    taken, left = (torch.stack([outcome[index] for outcome in outcomes]).sum(0) for index in (0, 2))
    torch.testing.assert_close(taken, saved, rtol=0, atol=1e-5)
    given = given_to(len(after), [ROUNDS])
    torch.testing.assert_close(outcomes[0][1].double() + left, given + taken, rtol=0, atol=1e-4)
    assert bool(left.any()) == (len(after) > 1)


@drawn(st.integers(0, 100), st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000), st.integers(0, 1000))
def test_blocks_are_whole_rows_inside_the_part(start: int, rows: int, columns: int, first: int, length: int):
    """They are sent as a product if that has fewer numbers."""
    part, matrix = slice(first, first + length), MatrixRows(start, rows, columns)
    inside = [row for row in range(rows) if start + row * columns >= first and start + (row + 1) * columns <= part.stop]
    worth = RANK * (len(inside) + columns) < len(inside) * columns
    expected = [MatrixRows(start + inside[0] * columns - first, len(inside), columns)] if inside and worth else []
    assert matrices_in_chunk(part, [matrix], RANK) == expected


def test_products_are_those_of_matrices():
    p, q = torch.randn(700, 3, dtype=torch.float64), torch.randn(400, 3, dtype=torch.float64)
    out = torch.empty(700, 400, dtype=torch.float64)
    multiply(p, q, out)
    torch.testing.assert_close(out, p @ q.T, rtol=1e-12, atol=1e-12)
