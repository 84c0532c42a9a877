"""Tasks: sums divided by units are the means of torch, however the examples are split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from trainer.tasks import Classification, LanguageModelling, MultiLabel, Regression, Task

Pair = tuple[Tensor, Tensor]


def images(examples: int) -> Pair:
    """Outputs [B, 5] and labels [B]."""
    generator = torch.Generator().manual_seed(examples)
    return torch.randn(examples, 5, generator=generator), torch.randint(5, (examples,), generator=generator)


def many_classes(examples: int) -> Pair:
    """Outputs [B, 8] and labels [B]."""
    generator = torch.Generator().manual_seed(examples)
    return torch.randn(examples, 8, generator=generator), torch.randint(8, (examples,), generator=generator)


def pairs(examples: int) -> Pair:
    """Outputs [B, 2] and labels [B]."""
    outputs, labels = images(examples)
    return outputs[:, :2], labels.clamp(max=1)


def tokens(examples: int) -> Pair:
    """Outputs [B, 4, 7] and tokens [B, 4]."""
    generator = torch.Generator().manual_seed(examples)
    return torch.randn(examples, 4, 7, generator=generator), torch.randint(7, (examples, 4), generator=generator)


def tags(examples: int) -> Pair:
    """Logits [B, 3] and labels [B, 3] of 0 and 1."""
    generator = torch.Generator().manual_seed(examples)
    return torch.randn(examples, 3, generator=generator), torch.randint(2, (examples, 3), generator=generator)


def numbers(examples: int) -> Pair:
    """Outputs [B, 2, 2] and targets [B, 2, 2], some far from each other."""
    generator = torch.Generator().manual_seed(examples)
    outputs, noise = torch.randn(2, examples, 2, 2, generator=generator)
    return outputs, outputs + 2 * noise


def heights(examples: int) -> Pair:
    """Outputs [B, 1] and targets [B]."""
    outputs, targets = numbers(examples)
    return outputs[:, :1, 0], targets[:, 0, 0]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.view_as(targets) - targets).square().mean()


def huber_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """e^2 / 2 up to 0.7, then 0.7 (|e| - 0.35)."""
    error = (outputs - targets).abs()
    return torch.where(error < 0.7, error.square() / 2, 0.7 * (error - 0.35)).mean()


CASES: list[tuple[Task, Callable[[int], Pair], int, Callable[[Tensor, Tensor], Tensor]]] = [
    (Classification(), images, 1, cross_entropy),
    (Classification(), many_classes, 1, cross_entropy),
    (Classification(), pairs, 1, cross_entropy),
    (LanguageModelling(), tokens, 4, cross_entropy),
    (MultiLabel(), tags, 3, binary_cross_entropy),
    (MultiLabel(auc=False), tags, 3, binary_cross_entropy),
    (Regression(), numbers, 4, squared_error),
    (Regression(), heights, 1, squared_error),
    (Regression(huber=0.7), numbers, 4, huber_loss),
]
cases = pytest.mark.parametrize(("task", "make", "units", "mean_loss"), CASES)


def _in_order(tensor: Tensor) -> Tensor:
    return tensor.coalesce() if tensor.is_sparse else tensor


def pooled(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {name: part.double() for name, part in task.pooled_sums(outputs, targets).items()}


@cases
@settings(deadline=None, max_examples=10)
@given(examples=st.integers(1, 30))
def test_loss_sums_are_means_times_units(task: Task, make, units: int, mean_loss, examples: int):
    outputs, targets = make(examples)
    mean = mean_loss(outputs, targets)
    assert task.units(targets) == units
    assert task.loss_sum(outputs, targets).item() == pytest.approx(mean.item() * units * examples, rel=1e-5)
    sums = task.score_sums(outputs, targets)
    assert sums.dtype == torch.float64 and sums.shape[0] == examples and sums.dim() == 2
    summary = task.summary(sums.sum(0), examples * units)
    assert summary["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert task.headline in summary
    figures = summary | task.pooled_summary(pooled(task, outputs, targets))
    assert set(figures) <= {"loss", *task.scores}


@cases
@settings(deadline=None, max_examples=10)
@given(examples=st.integers(0, 20), cut=st.integers(0, 20))
def test_any_split_adds_up(task: Task, make, units: int, mean_loss, examples: int, cut: int):
    """Sums over two parts are those over the whole; a part may be empty, and its loss is 0 with a gradient."""
    outputs, targets = make(examples)
    outputs.requires_grad_()
    parts = [slice(cut), slice(cut, None)]
    total = sum(task.loss_sum(outputs[part], targets[part]) for part in parts)
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(total, task.loss_sum(outputs, targets))
    total.backward()
    assert outputs.grad is not None and bool(outputs.grad.isfinite().all())
    outputs = outputs.detach()
    rows = torch.cat([task.score_sums(outputs[part], targets[part]) for part in parts])
    torch.testing.assert_close(rows, task.score_sums(outputs, targets))
    first, second = (pooled(task, outputs[part], targets[part]) for part in parts)
    whole = pooled(task, outputs, targets)
    for name, expected in whole.items():
        torch.testing.assert_close(_in_order(first[name] + second[name]), _in_order(expected))


@settings(deadline=None)
@given(st.integers(1, 30))
def test_accuracy_is_the_fraction_right(examples: int):
    outputs, targets = images(examples)
    sums = Classification().score_sums(outputs, targets).sum(0)
    right = (outputs.numpy().argmax(1) == targets.numpy()).mean()
    assert Classification().summary(sums, examples)["accuracy"] == pytest.approx(right)


def test_perplexity_is_the_exponential_of_the_loss():
    """It is exp(6 / 4); losses above 700 are clipped to keep it finite."""
    assert LanguageModelling().summary(torch.tensor([6.0]), 4)["perplexity"] == pytest.approx(math.exp(1.5))
    assert math.isfinite(LanguageModelling().summary(torch.tensor([1e6]), 1)["perplexity"])


@cases
def test_without_units_metrics_are_nan(task: Task, make, units: int, mean_loss):
    outputs, targets = make(3)
    sums = torch.zeros_like(task.score_sums(outputs, targets)[0])
    nothing = {name: torch.zeros_like(part) for name, part in pooled(task, outputs, targets).items()}
    figures = task.summary(sums, 0) | task.pooled_summary(nothing)
    assert all(math.isnan(value) for value in figures.values())


@cases
def test_outputs_that_are_not_finite_have_a_loss(task: Task, make, units: int, mean_loss):
    """A diverged model may be evaluated: the loss shows it, and nothing fails."""
    outputs, targets = make(4)
    outputs = torch.full_like(outputs, math.nan)
    assert not math.isfinite(task.summary(task.score_sums(outputs, targets).sum(0), 4.0 * units)["loss"])
    task.pooled_summary(pooled(task, outputs, targets))


def test_half_precision_outputs_are_evaluated_in_float32():
    """bfloat16 has 3 digits; the loss of its outputs is that of the same values in float32."""
    outputs, targets = images(20)
    half = outputs.bfloat16()
    expected = F.cross_entropy(half.float(), targets, reduction="sum").item()
    assert Classification().score_sums(half, targets)[:, 0].sum().item() == pytest.approx(expected, rel=1e-6)


@cases
def test_double_precision_outputs_are_evaluated_in_float64(task: Task, make, units: int, mean_loss):
    outputs, targets = make(20)
    outputs = outputs.double() + 1e-9  # lost in float32
    targets = targets.double() if targets.is_floating_point() else targets
    expected = mean_loss(outputs, targets).item() * 20 * units
    assert task.score_sums(outputs, targets)[:, 0].sum().item() == pytest.approx(expected, rel=1e-13)


@cases
def test_outputs_that_fit_have_no_mismatch(task: Task, make, units: int, mean_loss):
    outputs, targets = make(3)
    assert task.mismatch(outputs, targets, outputs.shape[-1]) == ""
    assert task.mismatch(outputs, targets, None) == ""


def test_outputs_that_do_not_fit_are_named():
    outputs, targets = images(3)
    assert "model.classes=10" in Classification().mismatch(outputs, targets, 10)
    for dtype in (torch.float32, torch.float64, torch.bool):
        assert "data.classes=5" in Classification().mismatch(outputs, targets.to(dtype), 5)
    assert "[3, 5, 1]" in Classification().mismatch(outputs[..., None], targets, 5)
    assert "[batch, labels]" in MultiLabel().mismatch(outputs, targets, 5)
    assert "[3, 5]" in Regression().mismatch(outputs, targets, None)
    outputs, targets = tokens(3)
    assert "model.vocabulary=9" in LanguageModelling().mismatch(outputs, targets, 9)
    assert "[3, 3, 7]" in LanguageModelling().mismatch(outputs[:, :3], targets, 7)
    outputs, targets = tags(3)
    assert "model.classes=3" in MultiLabel().mismatch(outputs[:, :2], targets, None)
    assert "must be 0" in MultiLabel().mismatch(outputs, targets + 1, None)


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [(Regression, {"huber": 0.0}, "task.huber=0")],
)
def test_invalid_settings_are_refused(task: Callable[..., Task], values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        task(**values)
