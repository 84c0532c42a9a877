"""Partitions at random, by label and by natural client.

Every client gets at least `min_examples` training examples. It may get no test examples where there are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from trainer.data.partition.allocation import allocate, count_labels, even_groups, merge_clients, scale_counts, top_up
from trainer.data.partition.base import column_errors, raise_errors, size_errors, smallest_errors
from trainer.data.partition.clients import Clients
from trainer.data.sources.base import Source
from trainer.utils.seeding import numpy_generator

DIRICHLET_DRAWS = 100


@dataclass(frozen=True)
class Iid:
    """Assign examples at random; client sizes differ by at most one."""

    min_examples: int = 1
    accepts_client_files = True

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        raise_errors(size_errors("iid", train, clients, self.min_examples))
        generator = numpy_generator(seed, "partition", "iid")
        train_clients, test_clients = (
            generator.permutation(even_groups(len(source), clients)) for source in (train, test)
        )
        return Clients.of(train_clients, test_clients, clients)


@dataclass(frozen=True)
class Quantity:
    """Assign random examples to clients of unequal sizes, drawn from Dirichlet(alpha, ..., alpha).

    A small alpha gives a few clients nearly everything. Sizes are redrawn, up to 100 times, until every client has
    `min_examples`. If that fails, the largest clients give examples away. Test examples are divided in the same
    proportions. Li et al. 2022, Federated learning on non-IID data silos: an experimental study (arXiv 2102.02079).
    """

    alpha: float
    min_examples: int = 1

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        errors = size_errors("quantity", train, clients, self.min_examples)
        if not 0 < self.alpha < inf:
            errors.append(f"partition.alpha={self.alpha}: a number above 0, such as 0.5; larger makes sizes more alike")
        raise_errors(errors)
        one_label = _Labels(np.zeros(len(train), np.int64), np.zeros(len(test), np.int64), 1)
        generator = numpy_generator(seed, "partition", "quantity")
        counts = Dirichlet(self.alpha, self.min_examples).draw(one_label.examples, clients, generator)
        return one_label.allocate(counts, self.min_examples, generator)


@dataclass(frozen=True)
class Dirichlet:
    """Divide each label's examples in proportions drawn from Dirichlet(alpha, ..., alpha).

    A small alpha gives clients few labels and unequal sizes, a large one makes them alike. Proportions are redrawn, up
    to 100 times, until every client has `min_examples`. If that fails, the largest clients give examples away. Test
    examples are divided like the training examples of their label. Yurochkin et al. 2019, Bayesian nonparametric
    federated learning of neural networks.
    """

    alpha: float
    min_examples: int = 1

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        errors = size_errors("dirichlet", train, clients, self.min_examples)
        errors += column_errors("dirichlet", "labels", train, test)
        if not 0 < self.alpha < inf:
            errors.append(
                f"partition.alpha={self.alpha}: a number above 0, such as 0.5; larger makes clients more alike"
            )
        raise_errors(errors)
        labels = _Labels.of(train, test)
        generator = numpy_generator(seed, "partition", "dirichlet")
        return labels.allocate(self.draw(labels.examples, clients, generator), self.min_examples, generator)

    def draw(self, examples: np.ndarray, clients: int, generator: np.random.Generator) -> np.ndarray:
        """Draw int64 [labels, clients], the training examples by label and client, from their number by label."""
        counts = np.zeros((len(examples), clients), np.int64)
        for _ in range(DIRICHLET_DRAWS):
            proportions = generator.dirichlet(np.full(clients, self.alpha), size=len(examples))
            ends = np.rint(proportions.cumsum(axis=1) * examples[:, None]).astype(np.int64)
            counts = np.diff(ends, prepend=0)
            if counts.sum(axis=0).min() >= self.min_examples:
                break
        return counts


@dataclass(frozen=True)
class Shards:
    """Sort the examples by label, cut clients * per_client equal shards, and give each client `per_client` of them.

    A client sees about `per_client` labels. The test examples of a label are divided in proportion to the clients'
    training examples of it. McMahan et al. 2017, Communication-efficient learning of deep networks from decentralized
    data: 100 clients with 2 shards of 300 digits each.
    """

    per_client: int = 2
    min_examples: int = 1

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        errors = size_errors("shards", train, clients, self.min_examples)
        errors += column_errors("shards", "labels", train, test)
        if self.per_client < 1:
            errors.append(f"partition.per_client={self.per_client}: a client needs at least 1 shard")
        raise_errors(errors)
        labels = _Labels.of(train, test)
        generator = numpy_generator(seed, "partition", "shards")
        shards = clients * self.per_client
        client_of_shard = generator.permutation(even_groups(shards, clients))
        client_of_sorted = client_of_shard[even_groups(len(train), shards)]
        counts = count_labels(np.sort(labels.train), client_of_sorted, labels.number, clients)
        return labels.allocate(counts, self.min_examples, generator)


@dataclass(frozen=True)
class Similarity:
    """Assign the fraction `similarity` at random; sort the rest by label and cut it into one piece per client.

    At 0 a client sees one or two labels, at 1 clients are alike. Client sizes differ by at most two. The test examples
    of a label are divided in proportion to the clients' training examples of it. Karimireddy et al. 2020, SCAFFOLD:
    stochastic controlled averaging for federated learning.
    """

    similarity: float
    min_examples: int = 1

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        errors = size_errors("similarity", train, clients, self.min_examples)
        errors += column_errors("similarity", "labels", train, test)
        if not 0 <= self.similarity <= 1:
            errors.append(f"partition.similarity={self.similarity}: the fraction assigned at random, from 0 to 1")
        raise_errors(errors)
        labels = _Labels.of(train, test)
        generator = numpy_generator(seed, "partition", "similarity")
        mixed, rest = np.split(generator.permutation(labels.train), [round(self.similarity * len(train))])
        counts = count_labels(mixed, even_groups(len(mixed), clients), labels.number, clients)
        client_of_sorted = generator.permutation(clients)[even_groups(len(rest), clients)]
        counts += count_labels(np.sort(rest), client_of_sorted, labels.number, clients)
        return labels.allocate(counts, self.min_examples, generator)


@dataclass(frozen=True)
class Natural:
    """Make every natural client a client; merge natural clients, never split them, where fewer clients are wanted.

    The largest natural client left joins the smallest client, which balances their training examples. Clients are
    numbered by their first natural client. Nothing is drawn, so the seed has no effect.
    """

    min_examples: int = 1
    is_natural = True
    accepts_client_files = True

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        raise_errors(
            size_errors("natural", train, clients, self.min_examples) or _client_id_errors(train, test, clients)
        )
        assert train.client_ids is not None and test.client_ids is not None
        values, inverse, examples = np.unique(train.client_ids, return_inverse=True, return_counts=True)
        client_of = merge_clients(examples, clients)
        test_clients = client_of[np.searchsorted(values, test.client_ids)]
        split = Clients.of(client_of[inverse], test_clients, clients)
        raise_errors(smallest_errors("natural", split, self.min_examples, "set fewer clients="))
        return split


def count_natural_clients(train: Source) -> int:
    """Return the number of natural clients of the training examples, the most clients that Natural can make."""
    raise_errors(column_errors("natural", "client_ids", train))
    assert train.client_ids is not None
    return len(np.unique(train.client_ids))


@dataclass(frozen=True)
class _Labels:
    """The labels of train and test, renumbered 0 to `number` - 1 over the values that occur in either."""

    train: np.ndarray
    test: np.ndarray
    number: int

    @staticmethod
    def of(train: Source, test: Source) -> _Labels:
        assert train.labels is not None and test.labels is not None
        values, labels = np.unique(np.concatenate([train.labels, test.labels]), return_inverse=True)
        return _Labels(labels[: len(train)], labels[len(train) :], len(values))

    @property
    def examples(self) -> np.ndarray:
        """Number of training examples of each label, int64 [number]."""
        return np.bincount(self.train, minlength=self.number)

    def allocate(self, counts: np.ndarray, min_examples: int, generator: np.random.Generator) -> Clients:
        """Make clients with these training examples by label and client, and test examples in proportion."""
        counts = top_up(counts, min_examples)
        test_examples = np.bincount(self.test, minlength=self.number)
        test_counts = scale_counts(counts, test_examples, generator)
        train_clients = allocate(self.train, counts, generator)
        test_clients = allocate(self.test, test_counts, generator)
        return Clients.of(train_clients, test_clients, counts.shape[1])


def _client_id_errors(train: Source, test: Source, clients: int) -> list[str]:
    if missing := column_errors("natural", "client_ids", train, test):
        return missing
    assert train.client_ids is not None and test.client_ids is not None
    errors, natural = [], np.unique(train.client_ids)
    if clients > len(natural):
        errors.append(
            f"partition=natural: clients={clients}, and the training examples have {len(natural)} natural clients.\n"
            f"  set clients={len(natural)} or fewer"
        )
    if len(untrained := np.setdiff1d(test.client_ids, natural)):
        errors.append(
            f"partition=natural: {len(untrained)} natural clients have test examples and no training examples, "
            f"such as client id {untrained[0]}.\n  leave their examples out, or set partition=iid"
        )
    return errors
