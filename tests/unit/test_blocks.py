"""Packed numbers: how far they are from those that were packed, and what cannot be packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trainer.gradients.blocks import LARGEST, SCALE_BYTES, pack, unpack

ROUNDING = 1e-6  # of float32, relative
laws = settings(deadline=None, max_examples=50)
floats = st.floats(-(2.0**100), 2.0**100, width=32)


def blocks(count: int, size: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (count, size), elements=floats)


@laws
@given(blocks(3, 8))
def test_each_number_is_off_by_half_a_unit_of_its_block(values: np.ndarray):
    """A unit is the block's largest number over 127."""
    unpacked = unpack(pack(torch.from_numpy(values))).numpy().astype(np.float64)
    largest = np.abs(values.astype(np.float64)).max(1, keepdims=True)
    assert (np.abs(unpacked - values) <= largest * (1 / (2 * LARGEST) + ROUNDING) + 1e-36).all()


@laws
@given(blocks(2, 4))
def test_it_is_the_formula(values: np.ndarray):
    """q = round(x / s) with s = max|x| / 127, halves to the even number; the bytes are the numbers, then the scale."""
    packed = pack(torch.from_numpy(values)).numpy()
    scale = np.maximum(np.abs(values).max(1, keepdims=True) / np.float32(LARGEST), np.finfo(np.float32).tiny)
    assert np.array_equal(packed[:, :4].view(np.int8), np.round(values / scale).astype(np.int8))
    assert np.array_equal(packed[:, 4:].copy().view(np.float32), scale)


def test_packed_numbers_may_be_cut_between_blocks():
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    packed = pack(values)
    assert packed.shape == (6, 8 + SCALE_BYTES) and packed.dtype == torch.uint8
    assert torch.equal(torch.cat([unpack(packed[:2]), unpack(packed[2:])]), unpack(packed))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_block_nan(bad: float):
    values = torch.ones(3, 4)
    values[1, 2] = bad
    unpacked = unpack(pack(values))
    assert unpacked[1].isnan().all()
    assert torch.equal(unpacked[[0, 2]], values[[0, 2]])


@pytest.mark.parametrize("small", [0.0, 1e-45, 1e-38])
def test_numbers_too_small_to_scale_are_not_divided_by_zero(small: float):
    values = torch.full((1, 4), small)
    assert (unpack(pack(values)) - values).abs().max() <= 1e-38


def test_double_precision_is_packed_too():
    values = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bound = values.abs().amax(1, keepdim=True) * (1 / (2 * LARGEST) + ROUNDING)
    assert ((unpack(pack(values)) - values).abs() <= bound).all()
