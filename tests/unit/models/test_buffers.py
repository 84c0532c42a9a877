"""Buffers: statistics of normalization layers pool to those of the union, all others stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.models.buffers import BufferStatistics, load_buffers, materialize_buffers, preserved_buffers
from trainer.models.flat import FlatModel

floats = st.floats(-50, 50, width=32)


class Averaging(nn.Module):
    """A layer that declares one of its buffers to be averaged."""

    averaged_buffers = ("average",)

    def __init__(self, average: Tensor):
        super().__init__()
        self.register_buffer("average", average)


class Holder(nn.Module):
    """A module with some buffers beside a trained layer."""

    def __init__(self, **buffers: Tensor):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def norm(mean: float, variance: float, plain: float, count: int) -> Any:
    """Return a BatchNorm layer with these statistics, and a float buffer that is declared to be averaged."""
    layer = nn.BatchNorm1d(1)
    layer.load_state_dict(
        {
            **layer.state_dict(),
            "running_mean": torch.tensor([mean]),
            "running_var": torch.tensor([variance]),
            "num_batches_tracked": torch.tensor(count),
        }
    )
    return nn.Sequential(layer, Averaging(torch.tensor([[plain]])))


@settings(deadline=None, max_examples=30)
@given(floats, st.floats(0, 100, width=32), floats, st.integers(0, 1 << 40))
def test_statistics_round_trip(mean: float, variance: float, plain: float, count: int):
    """They keep their bits, though variances are computed from moments, in float64."""
    before, after = norm(mean, variance, plain, count), norm(0.0, 1.0, 0.0, 0)
    source = BufferStatistics(before)
    assert source.vector().dtype == torch.float64 and source.counts().dtype == torch.int64
    BufferStatistics(after).load(source.vector(), source.counts())
    for ours, theirs in zip(after.buffers(), before.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(floats, min_size=1, max_size=9), min_size=1, max_size=5))
def test_pooled_moments_are_those_of_the_union(groups: list[list[float]]):
    """Weighted by n they are numpy's mean and variance of all numbers together; a declared buffer is averaged."""
    vectors, counts = [], []
    for number, group in enumerate(groups):
        statistics = BufferStatistics(norm(float(np.mean(group)), float(np.var(group)), float(len(group)), number))
        vectors.append(len(group) * statistics.vector())
        counts.append(statistics.counts())
    everything = np.concatenate(groups)
    pooled = norm(0.0, 0.0, 0.0, 0)
    BufferStatistics(pooled).load(torch.stack(vectors).sum(0) / len(everything), torch.stack(counts).max(0).values)
    assert pooled[0].running_mean.item() == pytest.approx(everything.mean(), abs=1e-4)
    assert pooled[0].running_var.item() == pytest.approx(everything.var(), abs=1e-2, rel=1e-4)
    assert pooled[1].average.item() == pytest.approx(sum(len(g) ** 2 for g in groups) / len(everything), rel=1e-6)
    assert pooled[0].num_batches_tracked.item() == len(groups) - 1


@pytest.mark.parametrize("moments", ["pooled", "mean"])
def test_statistics_of_a_real_layer(moments: Any):
    """Two BatchNorm2d are pooled: with `mean` without the variance between their means."""
    first, second, target = (nn.BatchNorm2d(4) for _ in range(3))
    for seed, layer in enumerate((first, second)):
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(torch.randn(4, generator=torch.Generator().manual_seed(seed)))
        layer.running_var.copy_(torch.arange(4) + seed)
    total = sum(BufferStatistics(layer, moments=moments).vector() for layer in (first, second))
    assert isinstance(total, Tensor)
    BufferStatistics(target, moments=moments).load(total / 2, BufferStatistics(first).counts())
    means, variances = (
        [dict(layer.named_buffers())[f"running_{name}"] for layer in (first, second)] for name in ("mean", "var")
    )
    torch.testing.assert_close(target.running_mean, (means[0] + means[1]) / 2)
    between = (means[0] - means[1]) ** 2 / 4 if moments == "pooled" else torch.zeros(4)
    torch.testing.assert_close(target.running_var, (variances[0] + variances[1]) / 2 + between)


@pytest.mark.parametrize(
    "buffers",
    [
        {"frequencies": torch.polar(torch.ones(3), torch.arange(3.0))},
        {"mask": torch.full((4, 4), float("-inf")).triu(1)},
        {"sentinel": torch.tensor(float("nan"))},
        {"pointer": torch.tensor(3)},
        {"flag": torch.tensor(True)},
        {"large": torch.tensor(60000.0, dtype=torch.float16)},
        {"running_var": torch.ones(3)},
        {"running_mean": torch.ones(3)},
        {"running_mean": torch.zeros(3, dtype=torch.int64), "running_var": torch.ones(3, dtype=torch.int64)},
        {"running_mean": torch.zeros(3, dtype=torch.complex64), "running_var": torch.ones(3)},
        {"running_mean": torch.zeros(3), "running_var": torch.ones(2)},
    ],
    ids=lambda buffers: "-".join(buffers),
)
def test_only_floating_pairs_are_statistics(buffers: dict[str, Tensor]):
    """All others belong to the rank: they are in no vector, and not counted."""
    model = FlatModel(Holder(**buffers))
    assert not model.statistics.has_buffers
    assert len(model.statistics.vector()) == len(model.statistics.counts()) == 0
    assert list(model.local_tensors) == list(buffers)


def test_statistics_that_a_layer_assigns_anew_are_those_that_count():
    """Some layers write `self.running_mean = ...` in each step."""
    layer = nn.BatchNorm1d(2)
    statistics = BufferStatistics(layer)
    layer.running_mean = torch.tensor([3.0, 4.0])
    assert statistics.vector()[:2].tolist() == [3.0, 4.0]
    statistics.load(torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64), torch.tensor([7]))
    assert layer.running_mean.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("wrong", ["no buffer", "a buffer of int64"])
def test_a_declaration_of_what_cannot_be_averaged_is_refused(wrong: str):
    layer = Averaging(torch.zeros(1, dtype=torch.int64 if "int64" in wrong else torch.float32))
    if wrong == "no buffer":
        layer.averaged_buffers = ("codebook",)
    with pytest.raises(ValueError, match=rf"averaged_buffers that 1\..* is {wrong}\.\n  valid: .*floating"):
        FlatModel(nn.Sequential(nn.Linear(2, 2), layer))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(20.0).expand(4, 20),
        lambda: torch.zeros(()).expand(3),
        lambda: torch.arange(9.0).unfold(0, 3, 1),
        lambda: torch.arange(6.0).view(2, 3).T,
        lambda: torch.arange(6.0)[::2],
        lambda: torch.zeros(0, 3),
    ],
    ids=["expanded", "a number", "windows", "transposed", "every other", "empty"],
)
def test_buffers_can_be_written(make: Callable[[], Tensor]):
    """Values stay the same, and an in-place write changes each element once."""
    module = Holder(buffer=make())
    materialize_buffers(module)
    buffer = module.get_buffer("buffer")
    assert torch.equal(buffer, make())
    buffer.add_(torch.ones_like(buffer))
    assert torch.equal(buffer, make() + 1)


def test_preserved_buffers_return_in_place_or_as_they_were():
    """One is written in place, one assigned anew with another shape, one only appears when it is used."""
    module: Any = Holder(written=torch.zeros(2), grown=torch.zeros(2))
    module.register_buffer("late", None, persistent=False)
    written = module.written
    with preserved_buffers(module):
        module.written += 1
        module.grown = torch.ones(5)
        module.late = torch.ones(1)
    assert module.written is written and not written.any()
    assert module.grown.shape == (2,) and not module.grown.any()
    load_buffers(module, {"late": torch.full((3,), 2.0)})
    assert module.late.tolist() == [2.0] * 3 and "late" not in module.state_dict()
