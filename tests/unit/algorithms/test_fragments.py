"""The fragments of Streaming: whole parameters, of about equal sizes, alike for any number of replicas."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.algorithms.streaming import fragment_edges
from trainer.models.flat import FlatModel
from trainer.utils.errors import InputError


def model_of(sizes: list[int], alignment: int = 1) -> FlatModel:
    """Return a model with vectors of these sizes."""
    return FlatModel(nn.ParameterList(torch.zeros(size) for size in sizes), alignment=alignment)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.data())
def test_fragments_are_whole_parameters(sizes: list[int], data: st.DataObject):
    """Each has one or more, and none is larger than an equal share by more than two parameters."""
    fragments = data.draw(st.integers(1, len(sizes)))
    model = model_of(sizes)
    edges = fragment_edges(model, fragments)
    assert edges == fragment_edges(model_of(sizes, alignment=64), fragments)[:-1] + edges[-1:]
    assert edges[0] == 0 and edges[-1] == len(model.shared) and len(edges) == fragments + 1
    starts = [placed.start for placed in model.shared_layout]
    firsts = [*map(starts.index, edges[:-1]), len(sizes)]
    held = [sum(sizes[first:last]) for first, last in pairwise(firsts)]
    assert min(last - first for first, last in pairwise(firsts)) >= 1
    assert max(held) <= sum(sizes) / fragments + 2 * max(sizes)


def test_equal_parameters_are_shared_equally():
    model = model_of([32] * 6)
    assert fragment_edges(model, 3) == [0, 64, 128, 192]


def test_more_fragments_than_parameters_are_refused():
    with pytest.raises(InputError, match=r"algorithm\.fragments=3: .* has 2\.\n  valid: 1 to 2"):
        fragment_edges(model_of([4, 4]), 3)


def test_clients_that_share_nothing_have_empty_fragments():
    model = FlatModel(nn.Linear(2, 2), is_shared=lambda name: False)
    assert fragment_edges(model, 3) == [0, 0, 0, 0]
