"""The errors of codecs are within their bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from trainer.distributed.compression import Cast, Codec, Int4, Int8, TopK
from trainer.distributed.compression.base import CPU_CHUNK_LENGTH
from trainer.distributed.compression.topk import SAMPLE

BLOCK = 16
CODECS: dict[str, Codec] = {
    "bf16": Cast("bfloat16"),
    "fp16": Cast("float16"),
    "int8": Int8(BLOCK),
    "int4": Int4(BLOCK),
    "topk": TopK(0.1),
}
FLOAT32_LARGEST = float(np.finfo(np.float32).max)

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
seeds = st.integers(0, 2**63 - 1)
vectors = arrays(
    np.float32, st.integers(0, 5 * BLOCK), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
).map(torch.from_numpy)
wide_vectors = arrays(
    np.float64, st.integers(0, 5 * BLOCK), elements=st.floats(allow_nan=False, allow_infinity=False)
).map(torch.from_numpy)


def packed_by(codec: Codec, values: Tensor, seed: int = 0) -> Tensor:
    """Return the encoded values, in memory that was not zero."""
    packed = torch.full((codec.encoded_size(len(values)),), 0xA5, dtype=torch.uint8)
    codec.encode(values, packed, seed)
    return packed


def sent_by(codec: Codec, values: Tensor, seed: int = 0) -> Tensor:
    """Return the decoded values, in their dtype."""
    arrived = torch.full_like(values, 17.0)
    codec.decode(packed_by(codec, values, seed), arrived)
    return arrived


def clamped(values: Tensor, most: float) -> Tensor:
    return values.double().clamp(-most, most)


def errors(codec: Codec, values: Tensor, most: float, seed: int = 0) -> Tensor:
    """Return the absolute errors, with values clamped to `most`."""
    return (sent_by(codec, values, seed).double() - clamped(values, most)).abs()


def scales_of(values: Tensor, levels: int) -> Tensor:
    """Return the largest magnitude / levels of each value's block."""
    padded = torch.nn.functional.pad(clamped(values, 2.0**127).abs(), (0, -len(values) % BLOCK))
    return (padded.view(-1, BLOCK).amax(1) / levels).repeat_interleave(BLOCK)[: len(values)]


@settings(deadline=None)
@given(vectors | wide_vectors)
def test_bfloat16_has_8_bits(values: Tensor):
    most = float(torch.finfo(torch.bfloat16).max)
    assert (errors(CODECS["bf16"], values, most) <= (clamped(values, most).abs() * 2**-8).clamp(min=1.2e-38)).all()


@settings(deadline=None)
@given(vectors)
def test_float16_is_that_of_numpy(values: Tensor):
    """Bits and the sign of zero are equal; values out of range become the largest."""
    expected = values.numpy().clip(-65504, 65504).astype(np.float16).astype(np.float32)
    assert np.array_equal(sent_by(CODECS["fp16"], values).numpy().view(np.int32), expected.view(np.int32))


@settings(deadline=None)
@given(wide_vectors)
def test_float16_has_11_bits(values: Tensor):
    assert (errors(CODECS["fp16"], values, 65504) <= (clamped(values, 65504).abs() * 2**-11).clamp(min=3e-8)).all()


@settings(deadline=None)
@given(vectors | wide_vectors)
def test_int8_is_off_by_half_a_step(values: Tensor):
    bound = (0.51 * scales_of(values, 127)).clamp(min=1.5e-36)
    assert (errors(CODECS["int8"], values, 2.0**127) <= bound).all()


@settings(deadline=None)
@given(vectors | wide_vectors, seeds)
def test_int4_is_off_by_a_step(values: Tensor, seed: int):
    bound = (1.0001 * scales_of(values, 7)).clamp(min=9e-38)
    assert (errors(CODECS["int4"], values, 2.0**127, seed) <= bound).all()


@settings(deadline=None)
@given(vectors | wide_vectors)
def test_topk_keeps_the_values_of_torch_topk(values: Tensor):
    """The same magnitudes; equal ones may have other indices. The kept values are exact."""
    k = min(len(values), max(1, len(values) // 10))
    sent = sent_by(CODECS["topk"], values)
    kept = clamped(values, FLOAT32_LARGEST).float().abs().topk(k).values
    assert torch.equal(sent.float().abs().topk(k).values, kept)
    assert int(sent.count_nonzero()) <= k
    places = sent.nonzero().squeeze(1)
    assert torch.equal(sent[places], clamped(values[places], FLOAT32_LARGEST).float().to(values.dtype))


def far_apart(count: int) -> Tensor:
    """Return values of all magnitudes."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, generator=generator) * 10 ** torch.empty(count).uniform_(-6, 3, generator=generator)


def seen_where_sampled(count: int) -> Tensor:
    """Return 1 at the indices that are sampled for the threshold, with two large values at others."""
    values = torch.zeros(count)
    values[:: max(count // SAMPLE, 1) | 1] = 1.0
    values[1:3] = 5.0
    return values


LONG = 3 * SAMPLE + 5
DIFFICULT = {
    "far apart": far_apart(LONG),
    "all equal": torch.full((LONG,), -0.25),
    "all zero": torch.zeros(LONG),
    "fewer than k": torch.zeros(LONG).index_fill_(0, torch.arange(0, LONG, 1000), 3.0),
    "small where sampled": 2 - seen_where_sampled(LONG).clamp(max=1),
    "large where sampled": seen_where_sampled(LONG),
}


@pytest.mark.parametrize("fraction", [1e-9, 0.001, 0.01, 0.2, 0.5])
@pytest.mark.parametrize("name", DIFFICULT)
def test_topk_finds_the_largest_though_the_sample_misleads(name: str, fraction: float):
    values, k = DIFFICULT[name], max(1, int(fraction * LONG))
    sent = sent_by(TopK(fraction), values)
    assert torch.equal(sent.abs().topk(k).values, values.abs().topk(k).values)
    assert int(sent.count_nonzero()) <= k


@every_codec
@settings(deadline=None)
@given(values=vectors | wide_vectors, seed=seeds)
def test_the_size_is_known_before(codec: Codec, values: Tensor, seed: int):
    """It is a multiple of 4 bytes, which are all written, and the same for the same seed."""
    packed = packed_by(codec, values, seed)
    assert len(packed) == codec.encoded_size(len(values)) and len(packed) % 4 == 0
    again = torch.zeros_like(packed)
    codec.encode(values, again, seed)
    assert torch.equal(packed, again)


@every_codec
@settings(deadline=None)
@given(count=st.integers(0, 5 * BLOCK), places=st.sets(st.integers(0, 5 * BLOCK)), seed=seeds)
def test_zeros_stay_zeros(codec: Codec, count: int, places: set[int], seed: int):
    """They have both signs, among other values."""
    values = far_apart(count)
    zeros = [place for place in places if place < count]
    values[zeros] = torch.tensor([0.0, -0.0]).repeat(len(zeros))[: len(zeros)]
    assert not sent_by(codec, values, seed)[zeros].count_nonzero()


@every_codec
def test_decoded_values_are_float32_numbers_in_either_dtype(codec: Codec):
    """A float64 model and a float32 model decode the same numbers."""
    values = far_apart(1000).double()
    packed = packed_by(codec, values)
    wide, narrow = torch.empty(1000, dtype=torch.float64), torch.empty(1000)
    codec.decode(packed, wide)
    codec.decode(packed, narrow)
    assert torch.equal(wide, narrow.double())


@every_codec
@pytest.mark.parametrize("count", [CPU_CHUNK_LENGTH - 1, CPU_CHUNK_LENGTH, 2 * CPU_CHUNK_LENGTH + BLOCK + 3])
def test_chunks_make_no_difference(codec: Codec, count: int):
    """Blocks are decoded independently, except with stochastic rounding and the choice of the largest."""
    values = far_apart(count)
    sent = sent_by(codec, values)
    if isinstance(codec, Int4 | TopK):
        assert float((sent - values).norm() / values.norm()) < 0.3
        return
    for part in (
        slice(0, BLOCK),
        slice(CPU_CHUNK_LENGTH - BLOCK, CPU_CHUNK_LENGTH),
        slice(count // BLOCK * BLOCK, count),
    ):
        assert torch.equal(sent[part], sent_by(codec, values[part]))


def test_int4_is_unbiased():
    """The mean over 400 seeds is tested; the standard deviation of a draw is at most half a step."""
    values, draws = far_apart(8 * BLOCK), 400
    mean = torch.stack([sent_by(CODECS["int4"], values, seed) for seed in range(draws)]).double().mean(0)
    deviations = (mean - values.double()).abs() / scales_of(values, 7)
    assert float(deviations.max()) < 5 * 0.5 / draws**0.5


def test_int4_draws_anew_for_every_seed_and_value():
    """Half of equal values between two multiples of the scale are rounded up, and others with another seed."""
    values = torch.cat([torch.full((1 << 16,), 3.5), torch.full((BLOCK,), 7.0)]).view(-1, BLOCK)
    values[:, 0] = 7.0
    first, second = (sent_by(CODECS["int4"], values.view(-1), seed).view(-1, BLOCK)[:-1, 1:] == 4 for seed in (1, 2))
    for share in (first, second, first == second, first[:, :-1] == first[:, 1:], first[:-1] == first[1:]):
        assert float(share.double().mean()) == pytest.approx(0.5, abs=0.01)


@every_codec
def test_error_feedback_sends_everything_in_the_end(codec: Codec):
    """After 200 rounds of random updates, the sum of the sent vectors and the residual is that of the updates.

    If a codec's error is at most q times the norm, the residual is at most q / (1 - q) times the largest update.
    """
    q = {"bf16": 2**-8, "fp16": 2**-11, "int8": 0.02, "int4": 0.4, "topk": 0.9**0.5}
    share = next(q[name] for name, known in CODECS.items() if known is codec)
    residual, given_so_far, sent_so_far = (torch.zeros(500, dtype=torch.float64) for _ in range(3))
    generator = torch.Generator().manual_seed(3)
    largest = 0.0
    for number in range(200):
        delta = torch.randn(500, generator=generator, dtype=torch.float64)
        largest = max(largest, float(delta.norm()))
        sent = sent_by(codec, delta + residual, number)
        residual = delta + residual - sent
        given_so_far, sent_so_far = given_so_far + delta, sent_so_far + sent
        assert float(residual.norm()) <= share / (1 - share) * largest
        torch.testing.assert_close(sent_so_far + residual, given_so_far, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [0, -8, 4, 100])
@pytest.mark.parametrize("make", [Int8, Int4])
def test_blocks_fill_bytes(make: type, block: int):
    with pytest.raises(ValueError, match=r"update_compression\.block"):
        make(block)


@pytest.mark.parametrize("fraction", [0, -0.1, 0.51, 2])
def test_fractions_that_save_nothing_are_refused(fraction: float):
    with pytest.raises(ValueError, match=r"update_compression\.fraction"):
        TopK(fraction)


def test_casts_are_to_16_bits():
    with pytest.raises(ValueError, match=r"update_compression\.dtype=float32\n  valid: bfloat16, float16"):
        Cast("float32")  # pyright: ignore[reportArgumentType]
