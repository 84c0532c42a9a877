"""The Partition protocol, and the checks that partitions share."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from trainer.data.partition.clients import Clients
from trainer.data.sources.base import DataSplits, Source
from trainer.data.sources.joined import JoinedSource
from trainer.data.sources.per_client import PerClientSource


class Partition(Protocol):
    """Abstract: assigns examples to clients.

    A partition is a pure function of the labels or client ids, the number of clients and the seed. Every example of
    the training and of the test source goes to exactly one client. Both are partitioned alike, so that a client is
    tested on the kind of examples that it trains on.

    Attributes (each may be missing, which means False):
        is_natural: whether the clients are the natural ones, so that their number is a property of the data.
        accepts_client_files: whether it may be set where each client brings a file, which leaves nothing to partition.
        is_computed_once: whether the first rank computes it for all, because it takes long, or rounds.

    One with a method `plot_points(source, seed)`, which returns ids and points [n, 2], has them drawn by client.
    """

    def split(self, train: Source, test: Source, clients: int, seed: int) -> Clients:
        """Return the examples of each of `clients` clients.

        Raises:
            ValueError: the examples cannot be partitioned like this; the message names the keys.
        """
        ...


def split_clients(data: DataSplits, partition: Partition, clients: int, seed: int) -> Clients:
    """Partition all examples of a data set; a validation source of its own is partitioned as the test source is.

    Raises:
        ValueError: the examples cannot be partitioned like this.
    """
    if not data.has_validation:
        return partition.split(data.train, data.test, clients, seed)
    # In one call, because a partition may depend on all labels that occur, and may take long.
    found, tests = partition.split(data.train, JoinedSource(data.test, data.validation), clients, seed), len(data.test)
    test, validation = zip(*((ids[ids < tests], ids[ids >= tests] - tests) for ids in found.test), strict=True)
    return replace(found, test=test, validation=validation)


def per_client_partition(data: DataSplits, partition: Partition, num_clients: int | None = None) -> Clients:
    """Return the clients of per-client files, each with the examples of its own file.

    Raises:
        ValueError: another number of clients, or another partition, is configured.
    """
    train, test = data.train, data.test
    assert isinstance(train, PerClientSource) and isinstance(test, PerClientSource)
    count = len(train.homes)
    if num_clients not in (None, count):
        raise ValueError(
            f"clients={num_clients} with {count} data.files: each file is a client.\n"
            f"  set clients={count}, or leave it out"
        )
    if not getattr(partition, "accepts_client_files", False):
        raise ValueError(
            f"partition={type(partition).__name__.lower()} with data.files: each file is a client already.\n"
            "  leave partition= out, or put all examples in one file"
        )
    train_ids, test_ids = (tuple(map(source.ids, range(count))) for source in (train, test))
    validation = tuple(np.empty(0, np.int64) for _ in range(count))
    if data.has_validation:
        assert isinstance(data.validation, PerClientSource)
        validation = tuple(map(data.validation.ids, range(count)))
    return Clients(train_ids, validation, test_ids, train.homes)


def size_errors(partition: str, train: Source, clients: int, min_examples: int) -> list[str]:
    """Return what is wrong with these numbers of clients and examples."""
    errors: list[str] = []
    if clients < 1:
        errors.append(f"clients={clients}: there must be at least 1 client")
    if min_examples < 1:
        errors.append(f"partition.min_examples={min_examples}: a client needs at least 1 training example")
    if not errors and clients * min_examples > len(train):
        fewer = f"  set clients={len(train) // min_examples} or fewer"
        less = f", or partition.min_examples={len(train) // clients} or less" if clients <= len(train) else ""
        errors.append(
            f"partition={partition}: clients={clients} with partition.min_examples={min_examples} need "
            f"{clients * min_examples} training examples, and there are {len(train)}.\n{fewer}{less}"
        )
    return errors


def column_errors(partition: str, column: str, *sources: Source) -> list[str]:
    """Return an error if a source lacks the column (`labels` or `client_ids`) that the partition is made by."""
    if all(getattr(source, column) is not None for source in sources):
        return []
    name = column.replace("_", " ")
    return [
        f"partition={partition} assigns examples by their {name}, and this data has no {name}.\n"
        f"  set partition=iid, or give the training and the test source {column}: one integer per example"
    ]


def smallest_errors(partition: str, clients: Clients, min_examples: int, way_out: str) -> list[str]:
    """Return an error if the smallest client has fewer than `min_examples` training examples."""
    smallest = int(clients.sizes.min())
    if smallest >= min_examples:
        return []
    return [
        f"partition={partition}: the smallest of clients={len(clients)} has {smallest} training examples, fewer than "
        f"partition.min_examples={min_examples}.\n  {way_out}, or set a smaller partition.min_examples="
    ]
