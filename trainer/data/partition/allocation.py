"""The arithmetic of partitions, on plain arrays.

`counts` is int64 [labels, clients], the number of examples of a label per client. `client_of` is int64 [N], the client
of every example. Labels are numbered from 0 without gaps.
"""

from __future__ import annotations

import heapq

import numpy as np


def even_groups(examples: int, groups: int) -> np.ndarray:
    """Return the group of every example, int64 [examples], ascending; group sizes differ by at most one."""
    return np.arange(examples) * groups // max(examples, 1)


def count_labels(labels: np.ndarray, client_of: np.ndarray, num_labels: int, clients: int) -> np.ndarray:
    """Return the counts of an assignment."""
    return np.bincount(labels * clients + client_of, minlength=num_labels * clients).reshape(num_labels, clients)


def allocate(labels: np.ndarray, counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw a client for every example such that the counts hold; return `client_of`."""
    num_labels, clients = counts.shape
    shuffled = generator.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    client_of = np.empty(len(labels), np.int64)
    client_of[by_label] = np.repeat(np.tile(np.arange(clients), num_labels), counts.ravel())
    return client_of


def top_up(counts: np.ndarray, min_examples: int) -> np.ndarray:
    """Return counts where the largest clients have given examples of their commonest labels to the smallest.

    Every client has at least `min_examples` then.
    """
    counts, sizes = counts.copy(), counts.sum(axis=0)
    assert sizes.sum() >= min_examples * len(sizes)
    while sizes.min() < min_examples:
        taker, giver = sizes.argmin(), sizes.argmax()
        label = counts[:, giver].argmax()
        moved = min(min_examples - sizes[taker], sizes[giver] - min_examples, counts[label, giver])
        counts[label, [taker, giver]] += [moved, -moved]
        sizes[[taker, giver]] += [moved, -moved]
    return counts


def scale_counts(counts: np.ndarray, examples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Divide `examples` (int64 [labels]) among the clients in the proportions of `counts`.

    Every count is less than 1 away from its exact share. A label that `counts` lacks is divided by the clients' sizes.
    """
    weights = np.where(counts.any(axis=1, keepdims=True), counts, counts.sum(axis=0))
    total = weights.sum(axis=1, keepdims=True)
    # A random offset per label decides who gets the fractions. Without it the same few clients would get all of them.
    ends = (weights.cumsum(axis=1) * examples[:, None] + generator.integers(total)) // total
    return np.diff(ends, prepend=0)


def merge_clients(examples: np.ndarray, clients: int) -> np.ndarray:
    """Merge natural clients with these numbers of examples into `clients` clients of similar size.

    The largest natural client left joins the smallest client: Graham's rule (1969), whose largest client is at most
    4/3 of the best possible.

    Returns:
        The client of every natural client, int64, numbered by its first natural client.
    """
    smallest_first = [(0, client) for client in range(clients)]
    client_of = np.empty(len(examples), np.int64)
    for natural in np.argsort(-examples, kind="stable"):
        size, client = smallest_first[0]
        client_of[natural] = client
        heapq.heapreplace(smallest_first, (size + int(examples[natural]), client))
    _, first = np.unique(client_of, return_index=True)
    return first.argsort().argsort()[client_of]
