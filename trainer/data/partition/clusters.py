"""Partition by content: clusters of similar examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trainer.data.partition.allocation import merge_clients
from trainer.data.partition.base import size_errors, smallest_errors
from trainer.data.partition.clients import Clients
from trainer.data.sources.base import Source
from trainer.data.sources.column import select_columns
from trainer.utils.errors import raise_errors
from trainer.utils.tensor_trees import describe

FETCHED = 4096  # examples at once
MAX_POINTS = 5000  # of a picture


@dataclass(frozen=True)
class Clusters:
    """Cluster the training examples by scikit-learn, and give each client whole clusters.

    With as many clusters as clients, the client of an example is its label of scikit-learn. More clusters are merged as
    `Natural` merges clients. Other examples join the cluster of the nearest center (k-means) or core sample (DBSCAN);
    so do the points that DBSCAN calls noise. Distances are Euclidean, of the inputs as the source gives them, flattened
    to vectors.

    It is computed on the first rank alone, which sends the others the client of each example: distances that round
    differently on another machine cannot make ranks disagree. One thread computes it, so that a resumed run finds the
    same clusters.

    Attributes:
        method: `kmeans` finds a given number of clusters; `dbscan` finds dense regions of any number and shape.
        clusters: number of clusters of k-means; None for one a client.
        eps: largest distance of neighbours, for DBSCAN.
        min_samples: neighbours, with itself, that make an example a core sample, for DBSCAN.
        columns: names of the columns of a table, or their numbers, to cluster by; None for all inputs.
        min_examples: fewest training examples a client may have.
    """

    method: Literal["kmeans", "dbscan"] = "kmeans"
    clusters: int | None = None
    eps: float = 0.5
    min_samples: int = 5
    columns: list[str] | list[int] | None = None
    min_examples: int = 1
    is_computed_once = True

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        from threadpoolctl import threadpool_limits

        raise_errors(size_errors("clusters", train, clients, self.min_examples) + self._errors(train, clients))
        points, test_points = (self.points(source, np.arange(len(source))) for source in (train, test))
        with threadpool_limits(1):
            labels, test_labels = self._labels(points, test_points, clients, seed)
        sizes = np.bincount(labels)
        if clients > len(sizes):
            raise ValueError(
                f"partition=clusters: clients={clients}, and {self.method} finds {len(sizes)} clusters.\n"
                f"  set clients={len(sizes)} or fewer, or other keys of partition="
            )
        client_of = merge_clients(sizes, clients) if clients < len(sizes) else np.arange(clients)
        split = Clients.of(client_of[labels], client_of[test_labels], clients)
        raise_errors(smallest_errors("clusters", split, self.min_examples, "set fewer clients="))
        return split

    def points(self, source: Source, ids: np.ndarray) -> np.ndarray:
        """Return the vectors by which these examples are clustered, float32 [N, D]."""
        parts = [source.fetch(some)[0] for some in torch.from_numpy(ids).split(FETCHED)]
        if not isinstance(parts[0], Tensor):
            raise ValueError(
                f"partition=clusters: the inputs are {describe(parts[0])}, and it needs one tensor.\n"
                "  set another partition="
            )
        points = torch.cat([part.flatten(1).float() for part in parts]).numpy()
        return select_columns(points, getattr(source, "column_names", ()), self.columns, "partition.columns")

    def plot_points(self, source: Source, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids of up to 5000 examples, and their first two principal components, float32 [n, 2]."""
        from sklearn.decomposition import PCA

        ids = np.linspace(0, len(source) - 1, min(len(source), MAX_POINTS)).astype(np.int64)
        points = self.points(source, ids)
        if points.shape[1] <= 2:
            return ids, np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
        return ids, PCA(2, random_state=seed % 2**32).fit_transform(points)

    def _labels(
        self, points: np.ndarray, test_points: np.ndarray, clients: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the cluster of each training and of each test example."""
        from sklearn.cluster import DBSCAN, KMeans

        if self.method == "kmeans":
            found: Any = KMeans(self.clusters or clients, random_state=seed % 2**32).fit(points)
            return found.labels_, found.predict(test_points)
        found = DBSCAN(eps=self.eps, min_samples=self.min_samples).fit(points)
        core = found.core_sample_indices_
        if not len(core):
            raise ValueError(
                "partition=clusters: dbscan finds noise alone, no clusters.\n"
                f"  set a larger partition.eps than {self.eps:g}, or less than partition.min_samples={self.min_samples}"
            )
        labels, is_noise = found.labels_, found.labels_ < 0
        labels[is_noise] = labels[core[_nearest(points[core], points[is_noise])]]
        return labels, labels[core[_nearest(points[core], test_points)]]

    def _errors(self, train: Source, clients: int) -> list[str]:
        errors = []
        if self.method not in ("kmeans", "dbscan"):
            errors.append(f"partition.method={self.method}\n  valid: kmeans or dbscan")
        if self.clusters is not None and self.method == "dbscan":
            errors.append(f"partition.clusters={self.clusters} with method=dbscan, which finds their number itself")
        elif self.clusters is not None and not clients <= self.clusters <= len(train):
            errors.append(f"partition.clusters={self.clusters}\n  valid: clients={clients} to {len(train)}, or null")
        if not 0 < self.eps < float("inf") or self.min_samples < 1:
            errors.append(
                f"partition.eps={self.eps} partition.min_samples={self.min_samples}\n  valid: above 0, and from 1"
            )
        return errors


def _nearest(core: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return for each point the index of the nearest core sample."""
    if not len(points):
        return np.empty(0, np.int64)
    from sklearn.neighbors import NearestNeighbors

    neighbours: Any = NearestNeighbors(n_neighbors=1).fit(core)
    return neighbours.kneighbors(points, return_distance=False)[:, 0]
