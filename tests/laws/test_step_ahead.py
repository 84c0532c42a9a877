"""Clients begin where the global parameters will be after the residual of their silo is added."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from tests.laws.cases import SIZES, fednova
from tests.laws.quadratics import EVERYONE, START, Walk, bowl_choices, path
from trainer.algorithms import FedAvg
from trainer.distributed.compression import TopK
from trainer.loop.assignment import assign_clients

ROUNDS = 5
PADDED = 16  # numbers of a slice, of which 5 are parameters
KEPT, KEPT_OF_SHARE = 2, 1  # largest numbers that are sent: of a slice, and of a quarter of it
SHARES = [slice(first, first + PADDED // 4) for first in range(0, PADDED, PADDED // 4)]


def largest(values: np.ndarray, kept: int = KEPT) -> np.ndarray:
    """Return the largest numbers in single precision, the others 0."""
    sent = np.zeros_like(values)
    places = np.argsort(-abs(values))[:kept]
    sent[places] = values[places].astype(np.float32)
    return sent


def largest_of_shares(values: np.ndarray) -> np.ndarray:
    """Return the largest number of each share, the others 0."""
    return np.concatenate([largest(values[share], KEPT_OF_SHARE) for share in SHARES])


def reference(walk: Walk, sizes: list[int]) -> np.ndarray:
    """Return the global points, in which clients of silo k begin at x_k = x - e_k.

    p_k = e_k + sum of n / N (x_k - w) over its clients; e_k = p_k - top(p_k); x <- x - sum top(p_k).
    """
    found, place, held = [], START, [np.zeros_like(START) for _ in sizes]
    for _ in range(ROUNDS):
        total = np.zeros_like(START)
        for silo, mine in enumerate(assign_clients(EVERYONE, SIZES, sizes)):
            deltas = [SIZES[client] / sum(SIZES) * walk.delta(client, place - held[silo]) for client in mine]
            given = held[silo] + np.sum(deltas, axis=0)
            sent = largest(given)
            held[silo] = given - sent
            total += sent
        place = place - total
        found.append(place)
    return np.stack(found)


def reference_of_four(walk: Walk) -> np.ndarray:
    """Return the same for four silos, of which silo k sums share k of all top(p).

    It sends top(sum + s_k) and keeps the residual s_k: x_k = x - e_k - s_k.
    """
    found, place, sizes = [], START, [1] * 4
    held, held_of_sums = [np.zeros_like(START) for _ in sizes], np.zeros_like(START)
    for _ in range(ROUNDS):
        total = held_of_sums.copy()
        for silo, mine in enumerate(assign_clients(EVERYONE, SIZES, sizes)):
            ahead = place - held[silo]
            ahead[SHARES[silo]] -= held_of_sums[SHARES[silo]]
            deltas = [SIZES[client] / sum(SIZES) * walk.delta(client, ahead) for client in mine]
            given = held[silo] + np.sum(deltas, axis=0)
            sent = largest_of_shares(given)
            held[silo] = given - sent
            total += sent
        sent = largest_of_shares(total)
        held_of_sums = total - sent
        place = place - sent
        found.append(place)
    return np.stack(found)


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [3, 1], [2, 1, 1]], ids=str)
@pytest.mark.parametrize("walk", [Walk(), Walk(pull=0.5)], ids=["fedavg", "fedprox"])
@pytest.mark.quick_rows(3)
def test_clients_begin_ahead(ranks, walk: Walk, sizes: list[int]):
    """On every rank, and with FedProx, which pulls to the client's start."""
    choices = bowl_choices(walk, rounds=ROUNDS, update_compression=TopK(KEPT / PADDED))
    by_rank = ranks(sum(sizes)).run(path, sizes, partial(FedAvg, proximal_mu=walk.pull), choices)
    np.testing.assert_allclose(by_rank[0], reference(walk, sizes), rtol=1e-12, atol=1e-12)
    assert all(np.array_equal(other, by_rank[0]) for other in by_rank)


@pytest.mark.parametrize("walk", [Walk(), Walk(pull=0.5)], ids=["fedavg", "fedprox"])
def test_clients_begin_ahead_by_what_is_held_back_of_sums_too(ranks, walk: Walk):
    """From four silos on, each sums a share of the numbers, and keeps a residual of that sum."""
    choices = bowl_choices(walk, rounds=ROUNDS, update_compression=TopK(KEPT / PADDED))
    by_rank = ranks(4).run(path, [1] * 4, partial(FedAvg, proximal_mu=walk.pull), choices)
    np.testing.assert_allclose(by_rank[0], reference_of_four(walk), rtol=1e-12, atol=1e-12)
    assert all(np.array_equal(other, by_rank[0]) for other in by_rank)


def test_alone_nobody_is_ahead(ranks):
    """A silo without a peer has no residual."""
    packed, plain = (
        ranks(1).run(path, 1, fednova, bowl_choices(rounds=ROUNDS, **uplink))[0]
        for uplink in ({"update_compression": TopK(KEPT / PADDED)}, {})
    )
    assert np.array_equal(packed, plain)
