"""Partitions at random, by label and by natural client.

Every client gets at least `min_examples` training examples. It may get no test examples where there are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from trainer.data.partition.allocation import allocate, count_labels, even_groups, merge_clients, scale_counts, top_up
from trainer.data.partition.base import column_errors, size_errors, smallest_errors
from trainer.data.partition.clients import Clients
from trainer.data.sources.base import Source
from trainer.utils.errors import raise_errors
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


class LabelPartition:
    """Base of partitions that draw how many examples of each label a client has. They override `draw`.

    The test examples of a label are divided in proportion to the clients' training examples of it.

    Attributes:
        has_labels: whether labels make a difference; otherwise all examples have the same one.
    """

    min_examples: int
    has_labels = True

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        name = type(self).__name__.lower()
        errors = size_errors(name, train, clients, self.min_examples)
        if self.has_labels:
            errors += column_errors(name, "labels", train, test)
        raise_errors(errors + self.errors())
        labels = Labels.of(train, test) if self.has_labels else Labels.equal(train, test)
        generator = numpy_generator(seed, "partition", name)
        counts = top_up(self.draw(labels, clients, generator), self.min_examples)
        test_counts = scale_counts(counts, np.bincount(labels.test, minlength=labels.number), generator)
        train_clients = allocate(labels.train, counts, generator)
        return Clients.of(train_clients, allocate(labels.test, test_counts, generator), clients)

    def errors(self) -> list[str]:
        """Return an error for each invalid choice."""
        return []

    def draw(self, labels: Labels, clients: int, generator: np.random.Generator) -> np.ndarray:
        """Draw int64 [labels, clients], the training examples by label and client."""
        raise NotImplementedError


@dataclass(frozen=True)
class Labels:
    """The labels of train and test, renumbered 0 to `number` - 1 over the values that occur in either."""

    train: np.ndarray
    test: np.ndarray
    number: int

    @staticmethod
    def of(train: Source, test: Source) -> Labels:
        assert train.labels is not None and test.labels is not None
        values, labels = np.unique(np.concatenate([train.labels, test.labels]), return_inverse=True)
        return Labels(labels[: len(train)], labels[len(train) :], len(values))

    @staticmethod
    def equal(train: Source, test: Source) -> Labels:
        return Labels(np.zeros(len(train), np.int64), np.zeros(len(test), np.int64), 1)


@dataclass(frozen=True)
class Dirichlet(LabelPartition):
    """Divide each label's examples in proportions drawn from Dirichlet(alpha, ..., alpha).

    A small alpha gives clients few labels and unequal sizes, a large one makes them alike. Proportions are redrawn, up
    to 100 times, until every client has `min_examples`. If that fails, the largest clients give examples away.
    Yurochkin et al. 2019, Bayesian nonparametric federated learning of neural networks.
    """

    alpha: float
    min_examples: int = 1

    def errors(self) -> list[str]:
        if 0 < self.alpha < inf:
            return []
        return [f"partition.alpha={self.alpha}: a number above 0, such as 0.5; larger makes clients more alike"]

    def draw(self, labels: Labels, clients: int, generator: np.random.Generator) -> np.ndarray:
        examples = np.bincount(labels.train, minlength=labels.number)
        counts = np.zeros((labels.number, clients), np.int64)
        for _ in range(DIRICHLET_DRAWS):
            proportions = generator.dirichlet(np.full(clients, self.alpha), size=labels.number)
            ends = np.rint(proportions.cumsum(axis=1) * examples[:, None]).astype(np.int64)
            counts = np.diff(ends, prepend=0)
            if counts.sum(axis=0).min() >= self.min_examples:
                break
        return counts


@dataclass(frozen=True)
class Quantity(Dirichlet):
    """Assign random examples to clients of unequal sizes, drawn from Dirichlet(alpha, ..., alpha).

    A small alpha gives a few clients nearly everything. Sizes are redrawn, up to 100 times, until every client has
    `min_examples`. If that fails, the largest clients give examples away. Li et al. 2022, Federated learning on non-IID
    data silos: an experimental study (arXiv 2102.02079).
    """

    has_labels = False


@dataclass(frozen=True)
class Shards(LabelPartition):
    """Sort the examples by label, cut clients * per_client equal shards, and give each client `per_client` of them.

    A client sees about `per_client` labels. McMahan et al. 2017, Communication-efficient learning of deep networks from
    decentralized data: 100 clients with 2 shards of 300 digits each.
    """

    per_client: int = 2
    min_examples: int = 1

    def errors(self) -> list[str]:
        if self.per_client >= 1:
            return []
        return [f"partition.per_client={self.per_client}: a client needs at least 1 shard"]

    def draw(self, labels: Labels, clients: int, generator: np.random.Generator) -> np.ndarray:
        shards = clients * self.per_client
        client_of_shard = generator.permutation(even_groups(shards, clients))
        client_of_sorted = client_of_shard[even_groups(len(labels.train), shards)]
        return count_labels(np.sort(labels.train), client_of_sorted, labels.number, clients)


@dataclass(frozen=True)
class Similarity(LabelPartition):
    """Assign the fraction `similarity` at random; sort the rest by label and cut it into one piece per client.

    At 0 a client sees one or two labels, at 1 clients are alike. Client sizes differ by at most two. Karimireddy et al.
    2020, SCAFFOLD: stochastic controlled averaging for federated learning.
    """

    similarity: float
    min_examples: int = 1

    def errors(self) -> list[str]:
        if 0 <= self.similarity <= 1:
            return []
        return [f"partition.similarity={self.similarity}: the fraction assigned at random, from 0 to 1"]

    def draw(self, labels: Labels, clients: int, generator: np.random.Generator) -> np.ndarray:
        shuffled = generator.permutation(labels.train)
        mixed, rest = np.split(shuffled, [round(self.similarity * len(shuffled))])
        counts = count_labels(mixed, even_groups(len(mixed), clients), labels.number, clients)
        client_of_sorted = generator.permutation(clients)[even_groups(len(rest), clients)]
        return counts + count_labels(np.sort(rest), client_of_sorted, labels.number, clients)


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
