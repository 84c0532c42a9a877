"""Tasks: sums that, divided by their units, are torch's means, however the examples are split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trainer.tasks import Classification, LanguageModelling, Task


def images(examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, 5] and labels [B]."""
    generator = torch.Generator().manual_seed(examples)
    return torch.randn(examples, 5, generator=generator), torch.randint(5, (examples,), generator=generator)


def tokens(examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, 4, 7] and tokens [B, 4]."""
    generator = torch.Generator().manual_seed(examples)
    return torch.randn(examples, 4, 7, generator=generator), torch.randint(7, (examples, 4), generator=generator)


TASKS = [(Classification(), images, 1), (LanguageModelling(), tokens, 4)]


@pytest.mark.parametrize(("task", "make", "units"), TASKS)
@settings(deadline=None)
@given(examples=st.integers(1, 30))
def test_loss_sums_are_means_times_units(task: Task, make, units: int, examples: int):
    outputs, targets = make(examples)
    mean = F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))
    assert task.units(targets) == units
    assert task.loss_sum(outputs, targets).item() == pytest.approx(mean.item() * units * examples, rel=1e-5)
    sums = task.score_sums(outputs, targets)
    assert sums.dtype == torch.float64 and sums.shape == (examples, 1 + len(task.scores))
    summary = task.summary(sums.sum(0), examples * units)
    assert summary["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert task.headline in summary


@pytest.mark.parametrize(("task", "make", "units"), TASKS)
@settings(deadline=None)
@given(examples=st.integers(0, 20), cut=st.integers(0, 20))
def test_any_split_adds_up(task: Task, make, units: int, examples: int, cut: int):
    """Sums over two parts are the sums over the whole; a part may be empty, and its loss is 0 with a gradient."""
    outputs, targets = make(examples)
    outputs.requires_grad_()
    parts = [slice(cut), slice(cut, None)]
    total = sum(task.loss_sum(outputs[part], targets[part]) for part in parts)
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(total, task.loss_sum(outputs, targets))
    total.backward()
    assert outputs.grad is not None and bool(outputs.grad.isfinite().all())
    rows = torch.cat([task.score_sums(outputs[part], targets[part]) for part in parts])
    torch.testing.assert_close(rows, task.score_sums(outputs, targets))


@settings(deadline=None)
@given(st.integers(1, 30))
def test_accuracy_is_the_fraction_right(examples: int):
    outputs, targets = images(examples)
    sums = Classification().score_sums(outputs, targets).sum(0)
    right = (outputs.numpy().argmax(1) == targets.numpy()).mean()
    assert Classification().summary(sums, examples)["accuracy"] == pytest.approx(right)


def test_perplexity_is_the_exponential_of_the_loss():
    """exp(6 / 4); beyond 700 it is held, or it would be infinite."""
    assert LanguageModelling().summary(torch.tensor([6.0]), 4)["perplexity"] == pytest.approx(math.exp(1.5))
    assert math.isfinite(LanguageModelling().summary(torch.tensor([1e6]), 1)["perplexity"])


@pytest.mark.parametrize(("task", "make", "units"), TASKS)
def test_no_units_have_no_figures(task: Task, make, units: int):
    assert all(math.isnan(value) for value in task.summary(torch.zeros(1 + len(task.scores)).double(), 0).values())


def test_half_precision_outputs_are_judged_in_float32():
    """bfloat16 has 3 digits: the loss of its outputs is that of the same numbers in float32."""
    outputs, targets = images(20)
    half = outputs.bfloat16()
    expected = F.cross_entropy(half.float(), targets, reduction="sum").item()
    assert Classification().score_sums(half, targets)[:, 0].sum().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("task", "make", "units"), TASKS)
def test_double_precision_outputs_are_judged_in_float64(task: Task, make, units: int):
    outputs, targets = make(20)
    outputs = outputs.double() + 1e-9  # lost in float32
    expected = F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1), reduction="sum").item()
    assert task.score_sums(outputs, targets)[:, 0].sum().item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("task", "make", "units"), TASKS)
def test_outputs_that_fit_have_no_fault(task: Task, make, units: int):
    outputs, targets = make(3)
    assert task.fault(outputs, targets, outputs.shape[-1]) == ""
    assert task.fault(outputs, targets, None) == ""


def test_outputs_that_do_not_fit_are_named():
    outputs, targets = images(3)
    assert "model.classes=10" in Classification().fault(outputs, targets, 10)
    assert "[3, 5, 1]" in Classification().fault(outputs[..., None], targets, 5)
    outputs, targets = tokens(3)
    assert "model.vocabulary=9" in LanguageModelling().fault(outputs, targets, 9)
    assert "[3, 3, 7]" in LanguageModelling().fault(outputs[:, :3], targets, 7)
