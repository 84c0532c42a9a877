"""Client sampling, and the assignment of clients to silos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.algorithms.round import Round
from trainer.data.client_sampling.sampling import AllClients, UniformSampler
from trainer.loop.assignment import assign_clients
from trainer.utils.seeding import derive_seed

client_sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=40)
silo_sizes = st.lists(st.integers(1, 4), min_size=1, max_size=6)


@settings(deadline=None)
@given(client_sizes, silo_sizes, st.data())
def test_every_client_is_trained_once(sizes: list[int], silos: list[int], data: st.DataObject):
    """The union of the silos' clients is the cohort, and each is ascending; the assignment is a pure function."""
    cohort = data.draw(st.sets(st.sampled_from(range(len(sizes)))))
    assigned = assign_clients(sorted(cohort), sizes, silos)
    assert len(assigned) == len(silos)
    assert sorted(client for mine in assigned for client in mine) == sorted(cohort)
    assert all(mine == sorted(mine) for mine in assigned)
    assert assigned == assign_clients(sorted(cohort), sizes, silos)


@settings(deadline=None)
@given(client_sizes, silo_sizes)
def test_silos_finish_within_one_client_of_each_other(sizes: list[int], silos: list[int]):
    """Loads, in examples a replica, differ by at most the load of the largest client in the busiest silo.

    A silo that got a client was the first to be free; so without its last client it is not behind any other.
    """
    assigned = assign_clients(range(len(sizes)), sizes, silos)
    loads = [sum(sizes[client] for client in mine) / ranks for mine, ranks in zip(assigned, silos, strict=True)]
    for mine, load, ranks in zip(assigned, loads, silos, strict=True):
        if mine:
            smallest = min(sizes[client] for client in mine) / ranks
            assert load - smallest <= min(loads) + 1e-9
    assert max(loads) - min(loads) <= max(sizes) / min(silos) + 1e-9


def test_a_larger_silo_gets_more():
    """Of six equal clients, silos of 2 and of 1 ranks get four and two."""
    assert [len(mine) for mine in assign_clients(range(6), [10] * 6, [2, 1])] == [4, 2]


def test_the_order_of_the_cohort_does_not_matter():
    assert assign_clients([4, 0, 2], [5, 9, 7, 9, 5], [1, 1]) == assign_clients([0, 2, 4], [5, 9, 7, 9, 5], [1, 1])


def test_no_clients_are_no_work():
    assert assign_clients([], [3, 4], [1, 2]) == [[], []]


def test_all_are_all():
    assert AllClients().sample(4, seed=9, index=3) == (0, 1, 2, 3)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 1000), st.integers(0, 1000), st.data())
def test_a_sample_is_a_pure_function_of_seed_and_round(clients: int, seed: int, index: int, data: st.DataObject):
    """It has `size` different clients, ascending.

    The global random states of torch and numpy are neither used nor changed.
    """
    size = data.draw(st.integers(1, clients))
    np.random.seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # pyright: ignore
    drawn = UniformSampler(size).sample(clients, seed, index)
    assert len(drawn) == len(set(drawn)) == size
    assert list(drawn) == sorted(drawn)
    assert set(drawn) <= set(range(clients))
    assert all(type(client) is int for client in drawn)
    assert UniformSampler(size).sample(clients, seed, index) == drawn
    assert np.array_equal(np.random.get_state()[1], before[0])  # pyright: ignore
    assert torch.equal(torch.get_rng_state(), before[1])


def test_golden_samples():
    """Resumed runs must draw the same samples in any later version."""
    drawn = [UniformSampler(3).sample(10, 0, index) for index in range(4)]
    assert drawn == [(0, 4, 5), (1, 3, 7), (0, 3, 4), (0, 5, 9)]


def test_samples_are_uniform():
    """In 2000 rounds each of 10 clients is drawn 600 times, within 4 standard deviations of sqrt(2000 * .3 * .7)."""
    drawn = [client for index in range(2000) for client in UniformSampler(3).sample(10, 7, index)]
    counts = np.bincount(drawn, minlength=10)
    assert abs(counts - 600).max() < 4 * np.sqrt(2000 * 0.3 * 0.7)


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_sample_that_cannot_be_drawn_is_refused(size: int):
    with pytest.raises(ValueError, match=rf"client_sampling\.clients_per_round={size} .*10 clients(.|\n)*1 to 10"):
        UniformSampler(size).sample(10, 0, 0)


def test_a_rounds_streams_are_its_own():
    """Streams differ by seed, round and tags, and are those of `derive`."""
    one = Round(3, 5, (0, 1))
    assert one.seed_for("model", 2) == derive_seed(5, "round", 3, "model", 2)
    others = [one.seed_for("model", 1), Round(4, 5, ()).seed_for("model", 2), Round(3, 6, ()).seed_for("model", 2)]
    assert len({one.seed_for("model", 2), *others}) == 4
    assert torch.equal(torch.rand(3, generator=one.generator("a")), torch.rand(3, generator=one.generator("a")))
