"""Laws of partitions: every example goes to one client, the same in every run, for training and test data alike."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainer.data import (
    Clients,
    DataSplits,
    Dirichlet,
    Hash,
    Iid,
    Natural,
    Partition,
    Quantity,
    Shards,
    Similarity,
    TensorSource,
    count_natural_clients,
    describe,
    fingerprint,
    split_clients,
)
from trainer.data.partition.allocation import merge_clients, scale_counts, top_up

laws = settings(max_examples=80, deadline=None)


@dataclass
class Case:
    train: TensorSource
    test: TensorSource
    clients: int
    seed: int


def arrays(labels: Any, client_ids: Any = None) -> TensorSource:
    return TensorSource(torch.zeros(len(labels), 1), torch.as_tensor(labels, dtype=torch.int64), client_ids)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def balanced(examples: int) -> TensorSource:
    """Return ten equally frequent labels in random order, as in MNIST."""
    return arrays(np.random.default_rng(0).permutation(examples) % 10)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Labels in -1..6, some of which may be only in train or in test; client ids 0, 3, 6, ..., all of them in train."""
    train = draw(st.lists(st.integers(-1, 6), min_size=1, max_size=120))
    test = draw(st.lists(st.integers(-1, 6), min_size=1, max_size=60))
    num_natural = draw(st.integers(1, len(train)))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    client_ids = generator.permutation(
        [*range(num_natural), *generator.integers(num_natural, size=len(train) - num_natural)]
    )
    test_ids = generator.integers(num_natural, size=len(test))
    clients = draw(st.integers(1, num_natural))
    return Case(arrays(train, 3 * client_ids), arrays(test, 3 * test_ids), clients, draw(st.integers(0, 2**40)))


alphas = st.floats(1e-4, 1e4)
partitions = st.one_of(
    st.just(Iid()),
    st.builds(Dirichlet, alphas),
    st.builds(Quantity, alphas),
    st.builds(Shards, st.integers(1, 5)),
    st.builds(Similarity, st.floats(0, 1)),
    st.just(Natural()),
)


def label_counts(labels: np.ndarray | None, clients: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return int64 [clients, labels]."""
    assert labels is not None
    return np.stack([np.bincount(labels[part], minlength=labels.max() + 1) for part in clients])


class TestLaws:
    @laws
    @given(case=cases(), partition=partitions)
    def test_every_example_goes_to_one_client_in_order(self, case: Case, partition: Partition) -> None:
        clients = partition.split(case.train, case.test, case.clients, case.seed)
        assert len(clients) == len(clients.train) == len(clients.validation) == len(clients.test) == case.clients
        for source, parts in ((case.train, clients.train), (case.test, clients.test)):
            assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
            assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(source)))
        assert all(len(part) == 0 for part in clients.validation)
        assert clients.sizes.tolist() == [len(part) for part in clients.train]

    @laws
    @given(case=cases(), partition=partitions)
    def test_a_partition_is_a_pure_function(self, case: Case, partition: Partition) -> None:
        first, second = (partition.split(case.train, case.test, case.clients, case.seed) for _ in range(2))
        for one, other in zip(first.train + first.test, second.train + second.test, strict=True):
            assert np.array_equal(one, other)

    @laws
    @given(case=cases(), kind=st.sampled_from([Iid, Shards, Dirichlet, Similarity]), alpha=alphas, data=st.data())
    def test_every_client_has_min_examples(self, case: Case, kind: Any, alpha: float, data: st.DataObject) -> None:
        least = data.draw(st.integers(1, len(case.train) // case.clients))
        level = {Dirichlet: (alpha,), Similarity: (alpha / 1e4,)}.get(kind, ())
        partition = kind(*level, min_examples=least)
        assert partition.split(case.train, case.test, case.clients, case.seed).sizes.min() >= least

    @pytest.mark.parametrize("partition", [Iid(), Dirichlet(0.5), Shards(), Similarity(0.1)])
    def test_another_seed_gives_another_partition(self, partition: Partition) -> None:
        train, test = balanced(400), balanced(100)
        first, second = (partition.split(train, test, 5, seed) for seed in (0, 1))
        assert not all(map(np.array_equal, first.train, second.train))
        assert not all(map(np.array_equal, first.test, second.test))

    @pytest.mark.parametrize("partition", [Iid(), Dirichlet(0.1, 20), Shards(), Similarity(0.1), Natural()])
    def test_a_thousand_clients_take_less_than_a_second(self, partition: Partition) -> None:
        labels, client_ids = np.arange(60000) % 10, np.arange(60000) % 3000
        train, test = arrays(labels, client_ids), arrays(labels[:10000], client_ids[:10000])
        start = time.perf_counter()
        partition.split(train, test, 1000, 0)
        assert time.perf_counter() - start < 1


class TestIid:
    @laws
    @given(case=cases())
    def test_sizes_differ_by_one_at_most(self, case: Case) -> None:
        clients = Iid().split(case.train, case.test, case.clients, case.seed)
        assert np.ptp(clients.sizes) <= 1 and np.ptp([len(part) for part in clients.test]) <= 1

    def test_every_client_sees_every_label(self) -> None:
        clients = Iid().split(balanced(10000), balanced(1000), 10, 0)
        assert label_counts(balanced(10000).labels, clients.train).min() > 60  # 100 expected, standard deviation 9


class TestDirichlet:
    @pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
    def test_test_examples_are_divided_as_training_examples(self, alpha: float) -> None:
        train, test = balanced(60000), balanced(10000)
        clients = Dirichlet(alpha).split(train, test, 20, seed=3)
        train_shares = label_counts(train.labels, clients.train) / 6000
        test_shares = label_counts(test.labels, clients.test) / 1000
        assert np.abs(train_shares - test_shares).max() <= 1 / 1000

    @pytest.mark.parametrize("alpha", [0.05, 0.5, 5.0, 500.0])
    def test_proportions_spread_as_the_distribution_says(self, alpha: float) -> None:
        # A proportion of Dirichlet(alpha, ..., alpha) over K clients has the variance (K - 1) / (K^2 (K alpha + 1)).
        train, clients = balanced(200_000), 10
        shares = [
            label_counts(train.labels, Dirichlet(alpha).split(train, balanced(10), clients, seed).train) / 20_000
            for seed in range(12)
        ]
        expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
        assert np.var(shares) == pytest.approx(expected, rel=0.25)

    def test_the_smallest_clients_are_topped_up_when_no_draw_suffices(self) -> None:
        clients = Dirichlet(1e-3, min_examples=12).split(balanced(600), balanced(100), 50, 0)
        assert clients.sizes.tolist() == [12] * 50


class TestShards:
    def test_is_the_partition_of_mcmahan(self) -> None:
        train, test = balanced(60000), balanced(10000)
        clients = Shards().split(train, test, 100, 0)
        assert clients.sizes.tolist() == [600] * 100
        train_counts, test_counts = label_counts(train.labels, clients.train), label_counts(test.labels, clients.test)
        assert set(np.unique(train_counts)) <= {0, 300, 600}
        assert np.abs(train_counts / 6 - test_counts).max() < 1

    @laws
    @given(examples=st.integers(200, 900), clients=st.integers(5, 20), per_client=st.integers(1, 4))
    def test_a_shard_spans_two_labels_at_most(self, examples: int, clients: int, per_client: int) -> None:
        assume(clients * per_client >= 10)  # a shard is then no larger than a label
        train = balanced(examples // 10 * 10)
        split = Shards(per_client).split(train, balanced(100), clients, 0)
        labels = (label_counts(train.labels, split.train) > 0).sum(axis=1)
        assert labels.max() <= 2 * per_client
        assert labels.sum() <= clients * per_client + 9  # each of 9 boundaries between labels cuts one shard at most


class TestSimilarity:
    @laws
    @given(case=cases(), similarity=st.floats(0, 1))
    def test_sizes_differ_by_two_at_most(self, case: Case, similarity: float) -> None:
        assert np.ptp(Similarity(similarity).split(case.train, case.test, case.clients, case.seed).sizes) <= 2

    def test_at_0_the_clients_are_pieces_of_the_sorted_examples(self) -> None:
        train, test = balanced(60000), balanced(10000)
        clients = Similarity(0.0).split(train, test, 100, 0)
        counts = label_counts(train.labels, clients.train)
        assert set(np.unique(counts)) == {0, 600} and (counts.sum(axis=1) == 600).all()
        assert np.array_equal(label_counts(test.labels, clients.test), counts / 6)

    def test_at_1_clients_are_alike(self) -> None:
        counts = label_counts(
            balanced(10000).labels, Similarity(1.0).split(balanced(10000), balanced(1000), 10, 0).train
        )
        assert counts.min() > 60  # 100 expected, standard deviation 9

    @pytest.mark.parametrize("similarity", [0.1, 0.5])
    def test_this_fraction_is_assigned_at_random(self, similarity: float) -> None:
        """A client of 6000 examples has about similarity * 600 of each label that is not its own."""
        train = balanced(60000)
        clients = Similarity(similarity).split(train, balanced(10000), 10, 0)
        counts = np.sort(label_counts(train.labels, clients.train), axis=1)
        expected = similarity * 600
        assert np.abs(counts[:, :8] - expected).max() < 5 * expected**0.5
        assert counts[:, -2:].sum(axis=1) == pytest.approx(6000 - 8 * expected, rel=0.02)

    def test_test_examples_are_divided_as_training_examples(self) -> None:
        train, test = balanced(60000), balanced(10000)
        clients = Similarity(0.3).split(train, test, 20, 3)
        difference = label_counts(train.labels, clients.train) / 6 - label_counts(test.labels, clients.test)
        assert np.abs(difference).max() < 1

    @pytest.mark.parametrize("similarity", [-0.1, 1.1, nan])
    def test_refuses_an_invalid_fraction(self, similarity: float) -> None:
        with pytest.raises(ValueError, match=f"partition.similarity={similarity}"):
            Similarity(similarity).split(balanced(30), balanced(10), 3, 0)


class TestNatural:
    def test_as_many_clients_as_natural_clients_are_the_natural_clients(self) -> None:
        train, test = arrays([0] * 6, np.array([5, 2, 9, 5, 2, 5])), arrays([0] * 3, np.array([9, 9, 2]))
        assert count_natural_clients(train) == 3
        clients = Natural().split(train, test, 3, 0)
        assert [part.tolist() for part in clients.train] == [[1, 4], [0, 3, 5], [2]]
        assert [part.tolist() for part in clients.test] == [[2], [], [0, 1]]

    @laws
    @given(case=cases())
    def test_natural_clients_are_never_split(self, case: Case) -> None:
        clients = Natural().split(case.train, case.test, case.clients, case.seed)
        assert case.train.client_ids is not None and case.test.client_ids is not None
        client_of: dict[int, int] = {}
        for client in range(len(clients)):
            for client_id in [
                *case.train.client_ids[clients.train[client]],
                *case.test.client_ids[clients.test[client]],
            ]:
                assert client_of.setdefault(client_id, client) == client
        first = [
            min(client_id for client_id, found in client_of.items() if found == client)
            for client in range(len(clients))
        ]
        assert first == sorted(first)

    @laws
    @given(examples=st.lists(st.integers(1, 50), min_size=1, max_size=40), data=st.data())
    def test_merging_balances_to_within_one_natural_client(self, examples: list[int], data: st.DataObject) -> None:
        clients = data.draw(st.integers(1, len(examples)))
        sizes = np.bincount(merge_clients(np.array(examples), clients), weights=examples, minlength=clients)
        assert sizes.min() >= 1
        assert sizes.max() - sizes.min() <= max(examples)


class TestRefusals:
    @pytest.mark.parametrize(
        "partition", [Iid(20), Dirichlet(0.5, 20), Shards(2, 20), Similarity(0.5, 20), Natural(20)]
    )
    def test_too_many_clients(self, partition: Partition) -> None:
        train = arrays([0, 1] * 50, np.arange(100))
        start = f"partition={type(partition).__name__.lower()}: clients=30 with partition.min_examples=20"
        with pytest.raises(ValueError, match=r"^partition=") as error:
            partition.split(train, train, 30, 0)
        assert str(error.value).splitlines() == [
            f"{start} need 600 training examples, and there are 100.",
            "  set clients=5 or fewer, or partition.min_examples=3 or less",
        ]

    @pytest.mark.parametrize("alpha", [0.0, -1.0, inf, nan])
    def test_all_errors_at_once(self, alpha: float) -> None:
        nameless = TensorSource(torch.zeros(3, 1), torch.zeros(3))
        with pytest.raises(ValueError, match="clients=0") as error:
            Dirichlet(alpha, min_examples=0).split(nameless, nameless, 0, 0)
        for key in ("partition.min_examples=0", f"partition.alpha={alpha}", "partition=dirichlet assigns"):
            assert key in str(error.value)

    def test_missing_columns(self) -> None:
        labelled, nameless = arrays([0, 1, 2]), TensorSource(torch.zeros(3, 1), torch.zeros(3))
        for train, test in ((labelled, nameless), (nameless, labelled)):
            with pytest.raises(ValueError, match=r"this data has no labels\.\n  set partition=iid"):
                Shards(1).split(train, test, 2, 0)
        with pytest.raises(ValueError, match=r"partition\.per_client=0"):
            Shards(0).split(labelled, labelled, 2, 0)
        with pytest.raises(ValueError, match="partition=natural assigns examples by their client ids"):
            Natural().split(labelled, labelled, 2, 0)
        with pytest.raises(ValueError, match="this data has no client ids"):
            count_natural_clients(labelled)

    def test_ids_that_cannot_be_clients(self) -> None:
        train = arrays([0] * 6, np.array([0, 0, 0, 0, 0, 1]))
        with pytest.raises(ValueError, match="clients=3, and the training examples have 2 natural clients"):
            Natural().split(train, train, 3, 0)
        with pytest.raises(ValueError, match="the smallest of clients=2 has 1 training examples"):
            Natural(min_examples=2).split(train, train, 2, 0)
        with pytest.raises(
            ValueError, match="1 natural clients have test examples and no training examples, such as client id 4"
        ):
            Natural().split(train, arrays([0, 0], np.array([1, 4])), 2, 0)


class TestSplitValidation:
    @laws
    @given(case=cases(), fraction=st.floats(0, 1, exclude_max=True))
    def test_moves_a_fraction_and_leaves_one(self, case: Case, fraction: float) -> None:
        before = Iid().split(case.train, case.test, case.clients, case.seed)
        after = before.split_validation(fraction, case.seed)
        for client in range(len(before)):
            train, validation = after.train[client], after.validation[client]
            assert np.array_equal(np.sort(np.concatenate([train, validation])), before.train[client])
            assert all((np.diff(part) > 0).all() for part in (train, validation))
            assert len(validation) == min(int(fraction * len(before.train[client])), len(before.train[client]) - 1)
        assert after.test == before.test

    def test_is_derived_from_the_seed(self) -> None:
        clients = Iid().split(balanced(300), balanced(10), 3, 0)
        one, same, other = (clients.split_validation(0.5, seed).validation for seed in (1, 1, 2))
        assert all(map(np.array_equal, one, same)) and not any(map(np.array_equal, one, other))

    @laws
    @given(case=cases(), number=st.integers(0, 200))
    def test_a_number_is_divided_in_proportion_to_the_sizes(self, case: Case, number: int) -> None:
        assume(len(case.train) > 2)
        number = 2 + number % (len(case.train) - 2)
        before = Natural().split(case.train, case.test, case.clients, case.seed)
        after = before.split_validation(number, case.seed)
        held_out = np.array([len(part) for part in after.validation])
        exact = before.sizes * number / len(case.train)
        assert (held_out < exact + 1).all() and (held_out <= before.sizes - 1).all()
        assert ((held_out > exact - 1) | (held_out == before.sizes - 1)).all()
        assert held_out.sum() == number or (held_out == before.sizes - 1).any()

    @pytest.mark.parametrize("fraction", [-0.1, 1.0, nan, 30, 1.5])
    def test_refuses_an_invalid_part(self, fraction: float) -> None:
        with pytest.raises(ValueError, match=f"data.validation={fraction}"):
            Iid().split(balanced(30), balanced(10), 3, 0).split_validation(fraction, 0)


class TestOwnValidation:
    @laws
    @given(case=cases(), partition=partitions)
    def test_is_partitioned_as_the_test_set_is_and_changes_no_training_set(
        self, case: Case, partition: Partition
    ) -> None:
        """Of each label a client has the same share of validation and of test examples, up to one example each."""
        data = DataSplits(case.train, case.test, None, validation=case.test)
        found = split_clients(data, partition, case.clients, case.seed)
        without = split_clients(data.without_validation(), partition, case.clients, case.seed)
        assert all(map(np.array_equal, found.train, without.train))
        assert not any(map(len, without.validation))
        for part in (found.test, found.validation):
            assert np.array_equal(np.sort(np.concatenate(part)), np.arange(len(case.test)))
            assert all((np.diff(ids) > 0).all() for ids in part)

    def test_is_part_of_the_fingerprint(self) -> None:
        """A resumed run is refused with another validation set, or another client of one of its examples."""
        sources = [balanced(30), balanced(10), arrays([1] * 10), arrays([2] * 10)]
        found = []
        for validation in (None, *sources[2:]):
            data = DataSplits(*sources[:2], None, validation=validation)
            found += [fingerprint(data, split_clients(data, Iid(), 2, seed)) for seed in (0, 1)]
        assert len(set(found)) == 6


class TestArithmetic:
    @laws
    @given(
        counts=st.lists(st.lists(st.integers(0, 30), min_size=4, max_size=4), min_size=1, max_size=5), data=st.data()
    )
    def test_topping_up_moves_and_never_makes_examples(self, counts: list[list[int]], data: st.DataObject) -> None:
        before = np.array(counts)
        least = data.draw(st.integers(0, before.sum() // 4))
        after = top_up(before, least)
        assert after.min() >= 0 and after.sum(axis=0).min() >= least
        assert np.array_equal(after.sum(axis=1), before.sum(axis=1))
        rich = before.sum(axis=0) >= least
        assert (after.sum(axis=0)[~rich] == least).all() and (after.sum(axis=0)[rich] <= before.sum(axis=0)[rich]).all()

    @laws
    @given(
        counts=st.lists(st.lists(st.integers(1, 30), min_size=4, max_size=4), min_size=1, max_size=5),
        examples=st.integers(0, 50),
        seed=st.integers(0, 99),
    )
    def test_proportions_are_kept_to_less_than_one_example(
        self, counts: list[list[int]], examples: int, seed: int
    ) -> None:
        given_, wanted = np.array(counts), np.full(len(counts), examples)
        found = scale_counts(given_, wanted, np.random.default_rng(seed))
        assert np.array_equal(found.sum(axis=1), wanted)
        assert np.abs(found - given_ * examples / given_.sum(axis=1, keepdims=True)).max() < 1

    def test_fractions_fall_to_others_in_every_label(self) -> None:
        found = scale_counts(np.ones((10, 40), np.int64), np.full(10, 10), np.random.default_rng(0))
        assert len(np.unique(found, axis=0)) > 1 and found.sum(axis=0).max() < 10

    def test_a_label_without_counts_is_divided_by_size(self) -> None:
        found = scale_counts(np.array([[3, 1], [0, 0]]), np.array([4, 8]), np.random.default_rng(0))
        assert found.tolist() == [[3, 1], [6, 2]]


class TestDescribe:
    def test_has_one_row_per_client(self) -> None:
        train = arrays([0, 0, 1, 1, 0, 1])
        clients = Clients(train=(ids(0, 1, 2), ids(3)), validation=(ids(), ids(4, 5)), test=(ids(0), ids()))
        assert describe(clients, train, ("cat", "dog")).splitlines() == [
            "client  train  validation  test  cat  dog",
            "     0      3           0     1    2    1",
            "     1      1           2     0    0    1",
        ]

    def test_counts_the_rows_it_leaves_out(self) -> None:
        clients = Iid().split(balanced(300), balanced(30), 30, 0)
        lines = describe(clients, balanced(300), most=4).splitlines()
        assert len(lines) == 6 and lines[-1] == "... and 26 more"
        assert lines[0].split() == ["client", "train", "validation", "test", *"0123456789"]

    def test_leaves_out_labels_that_are_none_or_too_many(self) -> None:
        for train in (TensorSource(torch.zeros(30, 1), torch.zeros(30)), arrays(range(30))):
            header, *_ = describe(Iid().split(train, train, 3, 0), train).splitlines()
            assert header.split() == ["client", "train", "validation", "test"]


def clients_of(partition: Partition, train: TensorSource, clients: int, seed: int = 0) -> np.ndarray:
    """Return the client of every training example."""
    split, client_of = partition.split(train, train, clients, seed), np.empty(len(train), np.int64)
    for client, own in enumerate(split.train):
        client_of[own] = client
    return client_of


class TestHash:
    @laws
    @given(st.integers(1, 12), st.integers(0, 2**40), st.sampled_from(["example", "client_id"]))
    def test_a_client_that_joins_takes_its_own_share_and_moves_nothing_else(
        self, clients: int, seed: int, key: Any
    ) -> None:
        """A client that leaves gives its share to the others: the same two states, in reverse."""
        train = arrays(np.zeros(1500), np.arange(1500) // 3)
        few, more = (clients_of(Hash(key, points=64), train, number, seed) for number in (clients, clients + 1))
        has_moved = few != more
        assert (more[has_moved] == clients).all() and (few[more == clients] != clients).all()
        assert has_moved.sum() == (more == clients).sum() < 2.5 * len(train) / (clients + 1)

    def test_hashed_clients_are_of_about_one_size(self) -> None:
        sizes = np.bincount(clients_of(Hash(points=256), balanced(100_000), 20))
        assert sizes.std() / sizes.mean() < 2 / 256**0.5

    def test_a_natural_client_has_one_client(self) -> None:
        train = arrays(np.zeros(900), np.random.default_rng(0).integers(0, 50, 900))
        client_of = clients_of(Hash("client_id"), train, 7)
        assert train.client_ids is not None
        assert all(
            len(np.unique(client_of[train.client_ids == client_id])) == 1 for client_id in np.unique(train.client_ids)
        )

    @pytest.mark.parametrize(
        ("partition", "message"),
        [
            (Hash("client_id"), "no client ids"),
            (Hash("label"), "valid: example or client_id"),  # pyright: ignore[reportArgumentType]
            (Hash(points=0), "partition.points=0"),
            (Hash(points=1, min_examples=9), "more partition.points="),
        ],
    )
    def test_what_cannot_be_hashed_is_refused(self, partition: Partition, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            partition.split(balanced(100), balanced(10), 10, 0)


class TestQuantity:
    @pytest.mark.parametrize("alpha", [0.2, 5.0])
    def test_sizes_spread_as_the_distribution_says(self, alpha: float) -> None:
        """The variance of a component of Dir(alpha, ..., alpha) over K is (K - 1) / (K^2 (K alpha + 1))."""
        train, clients = balanced(100_000), 20
        sizes = np.concatenate([Quantity(alpha).split(train, train, clients, seed).sizes for seed in range(30)])
        expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
        assert (sizes / len(train)).var() == pytest.approx(expected, rel=0.3)

    def test_clients_see_all_labels_alike(self) -> None:
        train = balanced(20_000)
        split = Quantity(1.0, min_examples=200).split(train, train, 5, 0)
        shares = label_counts(train.labels, split.train) / split.sizes[:, None]
        assert np.abs(shares - 0.1).max() < 0.06
