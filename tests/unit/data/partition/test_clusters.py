"""Clusters are those of scikit-learn, and every example joins the nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN, KMeans
from sklearn.datasets import make_blobs, make_moons

from trainer.commands.partition.plot import draw
from trainer.data import Clients, Clusters, DataSplits, TensorSource, split_clients
from trainer.data.partition.first_rank import split_on_first_rank
from trainer.distributed.topology import distributed

POINTS = make_blobs(300, n_features=4, centers=5, random_state=0)[0].astype(np.float32)
MOONS = make_moons(400, noise=0.05, random_state=0)[0].astype(np.float32)


def source(points: np.ndarray) -> TensorSource:
    return TensorSource(torch.from_numpy(points), torch.zeros(len(points), dtype=torch.int64))


def client_of(clients: Clients, part: str = "train") -> np.ndarray:
    """Return the client of every example."""
    ids_by_client = getattr(clients, part)
    owners = np.full(sum(map(len, ids_by_client)), -1)
    for client, ids in enumerate(ids_by_client):
        owners[ids] = client
    return owners


@pytest.mark.parametrize("seed", [0, 7])
def test_kmeans_labels_are_the_clients(seed: int) -> None:
    clients = Clusters().split(source(POINTS), source(POINTS[:50] + 0.1), 5, seed)
    expected = KMeans(5, random_state=seed).fit(POINTS)
    assert np.array_equal(client_of(clients), expected.labels_)
    assert np.array_equal(client_of(clients, "test"), expected.predict(POINTS[:50] + 0.1))


def test_dbscan_labels_are_the_clients_and_noise_joins_the_nearest_core_sample() -> None:
    points = np.concatenate([MOONS, [[5.0, 5.0], [-5.0, 0.0]]]).astype(np.float32)
    clients = Clusters("dbscan", eps=0.2).split(source(points), source(points[-2:]), 2, 0)
    expected = DBSCAN(eps=0.2).fit(points)
    is_noise = expected.labels_ < 0
    found, core = client_of(clients), expected.core_sample_indices_
    assert is_noise.sum() >= 2 and np.array_equal(found[~is_noise], expected.labels_[~is_noise])
    for row in np.flatnonzero(is_noise):
        nearest = core[np.square(points[core] - points[row]).sum(1).argmin()]
        assert found[row] == expected.labels_[nearest]
    assert np.array_equal(client_of(clients, "test"), found[-2:])


def test_more_clusters_than_clients_are_merged_whole() -> None:
    clients = Clusters(clusters=12).split(source(POINTS), source(POINTS), 3, 0)
    labels = KMeans(12, random_state=0).fit(POINTS).labels_
    owners = client_of(clients)
    assert all(len(set(owners[labels == label])) == 1 for label in range(12))
    assert clients.sizes.max() - clients.sizes.min() <= np.bincount(labels).max()


def test_columns_are_chosen_by_name_or_number() -> None:
    named = source(POINTS)
    named.column_names = ("age", "city", "city", "height")  # pyright: ignore[reportAttributeAccessIssue]
    expected = client_of(Clusters().split(source(POINTS[:, 1:3].copy()), source(POINTS[:, 1:3].copy()), 4, 0))
    for wanted in (["city"], [1, 2]):
        assert np.array_equal(client_of(Clusters(columns=wanted).split(named, named, 4, 0)), expected)  # pyright: ignore
    with pytest.raises(ValueError, match=r"partition.columns=\[town\]: there is no column town\n  valid: age, city"):
        Clusters(columns=["town"]).split(named, named, 4, 0)
    with pytest.raises(ValueError, match="valid: the numbers 0 to 3"):
        Clusters(columns=[4]).split(source(POINTS), source(POINTS), 4, 0)


@pytest.mark.parametrize(
    ("keys", "clients", "message"),
    [
        ({"method": "dbscan", "eps": 0.01}, 2, "dbscan finds noise alone, no clusters"),
        ({"method": "dbscan", "eps": 0.2}, 3, "clients=3, and dbscan finds 2 clusters"),
        ({"method": "ward"}, 2, "partition.method=ward\n  valid: kmeans or dbscan"),
        ({"clusters": 1}, 2, "partition.clusters=1\n  valid: clients=2 to 400"),
        ({"method": "dbscan", "clusters": 3}, 2, "which finds their number itself"),
        ({"min_examples": 199}, 3, "partition.min_examples=199 need 597 training examples"),
        ({"method": "dbscan", "eps": -1.0}, 2, "partition.eps=-1.0"),
    ],
)
def test_what_cannot_be_clustered_is_refused(keys: Any, clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        Clusters(**keys).split(source(MOONS), source(MOONS), clients, 0)
    assert message in str(error.value)


def split_differently(clients: int) -> Clients:
    """Return the clients on this rank, where rank 1 would compute others by itself."""
    with distributed(silos=2, device="cpu") as topology:
        points = POINTS + topology.rank * np.random.default_rng(0).normal(size=POINTS.shape).astype(np.float32)
        parts = [source(points[:200]), source(points[200:250]), source(points[250:])]
        data = DataSplits(*parts[:2], None, validation=parts[2])
        return split_on_first_rank(lambda: split_clients(data, Clusters(), clients, 0), data, clients, topology)


def test_all_ranks_have_those_of_the_first(ranks: Any) -> None:
    one, two = ranks(2).run(split_differently, 4)
    expected = KMeans(4, random_state=0).fit(POINTS[:200])
    assert np.array_equal(client_of(one), expected.labels_)
    assert np.array_equal(client_of(one, "test"), expected.predict(POINTS[200:250]))
    assert np.array_equal(client_of(one, "validation"), expected.predict(POINTS[250:]))
    for part in ("train", "test", "validation"):
        assert all(map(np.array_equal, getattr(one, part), getattr(two, part)))


def refused(clients: int) -> str:
    with pytest.raises(ValueError, match=r"\S") as error:
        split_differently(clients)
    return str(error.value)


def test_the_first_ranks_error_is_that_of_all(ranks: Any) -> None:
    message = ranks(2).run(refused, 1000)
    assert message[0] == message[1] and "clients=1000" in message[0]


def test_the_picture_shows_each_client_in_its_place() -> None:
    clients = Clusters().split(source(POINTS), source(POINTS), 5, 0)
    ids, points = Clusters().plot_points(source(POINTS), 0)
    assert points.shape == (300, 2) and np.array_equal(ids, np.arange(300))
    figure = draw(clients, source(POINTS), (), (ids, points))
    grey, dots = figure.axes[1].collections
    assert len(grey.get_offsets()) == 0 and len(dots.get_offsets()) == 300
    assert np.array_equal(np.asarray(dots.get_array()), client_of(clients))
