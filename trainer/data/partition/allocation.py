"""The arithmetic of partitions, on plain arrays.

`counts` is int64 [labels, clients], how many examples of a label a client gets; `client_of` is int64 [N], the client
of every example; labels are numbered from 0 without gaps.
"""

from __future__ import annotations

import heapq

import numpy as np


def even_groups(examples: int, groups: int) -> np.ndarray:
    """The group of every example, int64 [examples], ascending: consecutive groups whose sizes differ by one at most."""
    return np.arange(examples) * groups // max(examples, 1)


def count_labels(labels: np.ndarray, client_of: np.ndarray, num_labels: int, clients: int) -> np.ndarray:
    """The counts of a dealing."""
    return np.bincount(labels * clients + client_of, minlength=num_labels * clients).reshape(num_labels, clients)


def allocate(labels: np.ndarray, counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A client for every example, such that the counts hold; which examples of a label go where is drawn."""
    num_labels, clients = counts.shape
    shuffled = generator.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    client_of = np.empty(len(labels), np.int64)
    client_of[by_label] = np.repeat(np.tile(np.arange(clients), num_labels), counts.ravel())
    return client_of


def top_up(counts: np.ndarray, min_examples: int) -> np.ndarray:
    """The counts after the largest clients gave of their commonest labels to those with fewer than `min_examples`."""
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
    """Counts that divide `examples` (int64 [labels]) as `counts` divides its own; no count is off by one or more.

    Where the fractions fall is drawn for each label, or else the same few clients would win all of them. A label that
    `counts` has none of is divided by the clients' sizes.
    """
    weights = np.where(counts.any(axis=1, keepdims=True), counts, counts.sum(axis=0))
    total = weights.sum(axis=1, keepdims=True)
    ends = (weights.cumsum(axis=1) * examples[:, None] + generator.integers(total)) // total
    return np.diff(ends, prepend=0)


def merge_clients(examples: np.ndarray, clients: int) -> np.ndarray:
    """The client of every owner: the largest owner left joins the smallest client. Clients are numbered by first owner.

    `examples` is int64 [owners]. The rule is Graham's (1969), whose largest client is at most 4/3 of the best possible.
    """
    smallest_first = [(0, client) for client in range(clients)]
    client_of = np.empty(len(examples), np.int64)
    for owner in np.argsort(-examples, kind="stable"):
        size, client = smallest_first[0]
        client_of[owner] = client
        heapq.heapreplace(smallest_first, (size + int(examples[owner]), client))
    _, first_owner = np.unique(client_of, return_index=True)
    return first_owner.argsort().argsort()[client_of]
