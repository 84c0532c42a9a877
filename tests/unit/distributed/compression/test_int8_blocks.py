"""Quantized blocks that may be separated: their error, their layout, and values that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from trainer.distributed.compression.int8 import LEVELS, SCALE_BYTES, dequantize, quantize

BLOCK = 8
ROUNDING = 0.01  # of a scale: the rounding error of the division in float32
laws = settings(deadline=None, max_examples=50)
vectors = arrays(np.float32, 3 * BLOCK, elements=st.floats(-(2.0**100), 2.0**100, width=32))


def again(values: Tensor) -> Tensor:
    """Return the values, quantized and dequantized."""
    return dequantize(quantize(values, BLOCK), torch.empty_like(values))


def largest(values: np.ndarray) -> np.ndarray:
    """Return the largest magnitude of each value's block, in float64."""
    return np.abs(values.astype(np.float64)).reshape(-1, BLOCK).max(1).repeat(BLOCK)


@laws
@given(vectors)
def test_each_value_is_off_by_half_a_scale(values: np.ndarray):
    """A scale is the block's largest magnitude / 127."""
    off = np.abs(again(torch.from_numpy(values)).numpy().astype(np.float64) - values)
    assert (off <= largest(values) / LEVELS * (0.5 + ROUNDING) + 2e-36).all()


@laws
@given(vectors)
def test_the_bytes_are_the_numbers_and_then_their_scale(values: np.ndarray):
    packed = quantize(torch.from_numpy(values), BLOCK).numpy()
    scales = packed[:, BLOCK:].copy().view(np.float32)
    assert packed.shape == (3, BLOCK + SCALE_BYTES) and packed.dtype == np.uint8
    np.testing.assert_allclose(scales[:, 0], largest(values)[::BLOCK] / LEVELS, rtol=1e-6, atol=1e-38)
    expected = packed[:, :BLOCK].view(np.int8) * scales
    assert np.array_equal(again(torch.from_numpy(values)).numpy(), expected.ravel())


def test_bytes_may_be_cut_between_blocks():
    values = torch.randn(6 * BLOCK, generator=torch.Generator().manual_seed(0))
    packed = quantize(values, BLOCK)
    parts = [dequantize(part, torch.empty(3 * BLOCK)) for part in packed.chunk(2)]
    assert torch.equal(torch.cat(parts), again(values))
    assert torch.equal(dequantize(packed, torch.empty(20)), again(values)[:20])  # padding is removed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**127])
def test_a_value_that_is_not_finite_makes_its_block_nan(bad: float):
    values = torch.ones(3 * BLOCK)
    values[BLOCK + 2] = bad
    first, second, third = again(values).chunk(3)
    assert second.isnan().all()
    assert torch.equal(first, values[:BLOCK]) and torch.equal(third, values[:BLOCK])


@pytest.mark.parametrize("small", [0.0, 1e-45, 1e-38])
def test_numbers_too_small_to_scale_are_not_divided_by_zero(small: float):
    values = torch.full((BLOCK,), small)
    assert (again(values) - values).abs().max() <= 1e-38


def test_double_precision_is_quantized_too():
    values = torch.randn(2 * BLOCK, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert ((again(values) - values).abs().numpy() <= largest(values.numpy()) / LEVELS * (0.5 + ROUNDING)).all()
