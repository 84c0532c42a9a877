"""The silos of a run that is resumed in another world."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.distributed.silos import silo_sizes

few = st.integers(1, 12)
nodes = st.lists(st.integers(1, 4), min_size=1, max_size=6)  # ranks of each node


@given(few, few, few)
def test_a_resumed_run_has_the_most_silos_that_fit(configured: int, ranks: int, clients: int):
    """At most the configured number, at most one a client, all of one size."""
    sizes = silo_sizes(configured, [0] * ranks, clients)
    allowed = [count for count in range(1, min(configured, clients) + 1) if ranks % count == 0]
    assert len(sizes) == max(allowed)
    assert sum(sizes) == ranks and len(set(sizes)) == 1


@given(nodes, few)
def test_nodes_share_a_silo_if_there_are_more_than_clients(counts: list[int], clients: int):
    """Each silo has the same number of whole, consecutive nodes."""
    sizes = silo_sizes("node", [node for node, count in enumerate(counts) for _ in range(count)], clients)
    assert len(sizes) == max(count for count in range(1, clients + 1) if len(counts) % count == 0)
    each = len(counts) // len(sizes)
    assert sizes == tuple(sum(counts[start : start + each]) for start in range(0, len(counts), each))


@given(nodes)
def test_at_the_first_start_a_node_is_a_silo(counts: list[int]):
    assert silo_sizes("node", [node for node, count in enumerate(counts) for _ in range(count)]) == tuple(counts)


def test_a_number_that_does_not_fit_is_refused_at_the_first_start_and_a_list_always():
    with pytest.raises(ValueError, match="silos=2 does not divide"):
        silo_sizes(2, [0, 0, 0])
    for clients in (None, 2):
        with pytest.raises(ValueError, match=r"silos=\[1,1\] adds up to 2"):
            silo_sizes([1, 1], [0, 0, 0], clients)
