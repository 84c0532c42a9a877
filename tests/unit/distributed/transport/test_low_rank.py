"""PowerSGDReducer's wire: what is of small rank arrives as it is, nothing else is lost, all ranks are told the same."""

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
    """The parameters that lie in a vector."""
    return [vector[start : start + shape.numel()].view(shape) for start, shape in PLACES]


def vector_of(silo: int, round: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 * round + silo)
    return torch.randn(LENGTH, generator=generator, dtype=torch.float64).to(dtype)


def total_of(wire: PowerSGDAllReduce, vector: Tensor, round: int) -> Tensor:
    """The joined sum of a round."""
    wire.start_round(Round(round, 0, ()).seed_for)
    for part, total in wire.all_reduce_async(vector, "delta"):
        vector[part] = total
    return wire.all_gather(vector)


def rounds_of(
    sizes: list[int], part: int, rounds: int = ROUNDS, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], dict[str, Any], int]:
    """The totals of some rounds on this rank, its state, and the bytes."""
    with patch("trainer.distributed.transport.base.CHUNK_SIZE", part), distributed(sizes) as topology:
        wire = PowerSGDAllReduce(topology, RANK, PLACES)
        totals = [total_of(wire, vector_of(topology.silo, round, dtype), round) for round in range(rounds)]
        return totals, wire.state_dict(), wire.bytes_sent


def given_to(silos: int, rounds: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The plain sum of all silos' vectors over some rounds."""
    return torch.stack([vector_of(silo, round, dtype) for silo in range(silos) for round in rounds]).double().sum(0)


@pytest.mark.parametrize(
    ("part", "dtype", "tolerance"), [(1 << 22, torch.float64, 1e-10), (200, torch.float32, 1e-4)], ids=["all", "parts"]
)
@every_world
def test_what_was_sent_and_what_is_left_is_what_was_given(
    ranks, sizes: list[int], part: int, dtype: torch.dtype, tolerance: float
):
    """The same bits on all ranks; what is no matrix arrives at once; of a matrix its rank arrives."""
    outcomes = ranks(sum(sizes)).run(rounds_of, sizes, part, ROUNDS, dtype)
    totals = outcomes[0][0]
    for others, _, _ in outcomes:
        assert all(map(torch.equal, others, totals))
    left = unsent([state["residuals"] for _, state, _ in outcomes])
    plain = (
        torch.stack([vector_of(silo, r, dtype) for silo in range(len(sizes)) for r in range(ROUNDS)]).double().sum(0)
    )
    torch.testing.assert_close(torch.stack(totals).double().sum(0) + left, plain, rtol=0, atol=tolerance)
    assert not left[600:624].any() and left[:600].any() and left[624:1008].any()
    if part > LENGTH and sizes in ([1, 1], [3, 1]):
        assert [int(torch.linalg.matrix_rank(view.flatten(1))) for view in views(totals[0])[::2]] == [RANK, RANK]


def thin_sum(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The total of matrices that all have their rows in one plane, and what is left."""
    with distributed(sizes) as topology:
        wire = PowerSGDAllReduce(topology, RANK, PLACES)
        total = total_of(wire, thin_vector(topology.silo), 0)
        return total, unsent([wire.state_dict()["residuals"]])


def thin_vector(silo: int) -> Tensor:
    vector = torch.zeros(LENGTH, dtype=torch.float64)
    for view in views(vector)[::2]:
        plane = torch.randn(RANK, view[0].numel(), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        own = torch.randn(len(view), RANK, generator=torch.Generator().manual_seed(silo), dtype=torch.float64)
        view.flatten(1).copy_(own @ plane)
    return vector


@every_world
def test_matrices_of_the_rank_arrive_as_they_are(ranks, sizes: list[int]):
    """Their columns' span is found in the first round, from a random Q."""
    expected = torch.stack([thin_vector(silo) for silo in range(len(sizes))]).sum(0)
    outcomes = ranks(sum(sizes)).run(thin_sum, sizes)
    torch.testing.assert_close(outcomes[0][0], expected, rtol=0, atol=1e-12)


def same_again(rounds: int) -> list[float]:
    """How far the totals of one vector, given again and again, are from the best of that rank; without residuals."""
    with distributed([1, 1]) as topology:
        wire, best = PowerSGDAllReduce(topology, RANK, PLACES), 2 * vector_of(0, 0, torch.float64)
        weight = views(best)[0]
        u, s, v = torch.linalg.svd(weight)
        weight.copy_(u[:, :RANK] * s[:RANK] @ v[:RANK])
        apart = []
        for round in range(rounds):
            total = total_of(wire, vector_of(0, 0, torch.float64), round)
            wire.residuals.residuals.clear()
            apart.append(float((views(total)[0] - weight).norm() / weight.norm()))
        return apart


def test_the_rows_of_one_round_begin_the_next(ranks):
    """Power iteration: Vogels et al. 2019, theorem 1, the best approximation of that rank is what it comes to."""
    apart = ranks(2).run(same_again, 60)[0]
    assert apart[0] > 0.3 and apart[-1] < 0.02 and apart[30] < apart[3]


def test_bytes_are_those_that_go_over(ranks):
    """All-reduces of P with what is no matrix, and of Q, 2 (S - 1) times each; P once more from the first silo."""
    for _, _, counted in ranks(3).run(rounds_of, [1, 1, 1], 1 << 22):
        columns, rows, rest = RANK * (20 + 12), RANK * (30 + 32), 24
        assert counted == ROUNDS * 2 * 4 * (2 * (columns + rest) + columns + 2 * rows)


def gone_on(sizes: list[int], states: dict[int, Any], before: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What this rank has still to send when it takes the states over; the next total, and what is left then."""
    with patch("trainer.distributed.transport.base.CHUNK_SIZE", 200), distributed(sizes) as topology:
        wire = PowerSGDAllReduce(topology, RANK, PLACES)
        mine = [state for silo, state in states.items() if silo % len(sizes) == topology.silo]
        wire.load_state_dicts(mine, wire.chunks(LENGTH), before == sizes)
        taken = unsent([wire.state_dict()["residuals"]])
        total = total_of(wire, vector_of(topology.silo, ROUNDS), ROUNDS)
        return taken, total, unsent([wire.state_dict()["residuals"]])


def saved_by(ranks: Any, sizes: list[int]) -> tuple[dict[int, Any], Tensor]:
    """The states of three rounds as a checkpoint holds them, and all that is still to be sent."""
    states = [state for _, state, _ in ranks(sum(sizes)).run(rounds_of, sizes, 200)]
    return merged(sizes, states), unsent([state["residuals"] for state in states])


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [3, 1]], ids=str)
def test_a_wire_goes_on_with_the_same_bits(ranks, sizes: list[int]):
    states, _ = saved_by(ranks, sizes)
    resumed = ranks(sum(sizes)).run(gone_on, sizes, states, sizes)
    through = ranks(sum(sizes)).run(rounds_of, sizes, 200, ROUNDS + 1)
    for (_, total, left), (totals, state, _) in zip(resumed, through, strict=True):
        assert torch.equal(total, totals[-1])
        assert torch.equal(left, unsent([state["residuals"]]))


@pytest.mark.parametrize("after", [[1], [1, 1], [3, 1], [1, 1, 1, 1]], ids=str)
def test_nothing_is_lost_in_another_world(ranks, after: list[int]):
    states, had = saved_by(ranks, [2, 2])
    outcomes = ranks(sum(after)).run(gone_on, after, states, [2, 2])
    taken, left = (torch.stack([outcome[place] for outcome in outcomes]).sum(0) for place in (0, 2))
    torch.testing.assert_close(taken, had, rtol=0, atol=1e-5)
    given = given_to(len(after), [ROUNDS])
    torch.testing.assert_close(outcomes[0][1].double() + left, given + taken, rtol=0, atol=1e-4)
    assert bool(left.any()) == (len(after) > 1)


@drawn(st.integers(0, 100), st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000), st.integers(0, 1000))
def test_blocks_are_whole_rows_inside_the_part(start: int, rows: int, columns: int, first: int, length: int):
    """As many as there are, if any are worth it."""
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
