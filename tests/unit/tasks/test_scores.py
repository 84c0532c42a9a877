"""Scores from sums against scikit-learn, which sees all examples together."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor

from trainer.tasks import REQUIRED_METHODS, Classification, MultiLabel, Regression, Task
from trainer.tasks.metrics import auc, r2, score_histogram


def metrics_of(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return all metrics, from the sums of three parts of the examples, one of them empty."""
    edges = (0, len(outputs) // 3, len(outputs) // 3, len(outputs))
    parts = [slice(a, b) for a, b in pairwise(edges)]
    rows = sum(task.score_sums(outputs[part], targets[part]).sum(0) for part in parts)
    assert isinstance(rows, Tensor)
    sums = [task.pooled_sums(outputs[part], targets[part]) for part in parts]
    pooled = {name: torch.stack([one[name].double() for one in sums]).sum(0) for name in sums[0]}
    return task.summary(rows, task.units(targets) * len(targets)) | task.pooled_summary(pooled)


def labelled(classes: int, examples: int = 400, skill: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return logits [B, classes] correlated with labels [B]; the last class does not occur."""
    generator = torch.Generator().manual_seed(classes)
    targets = torch.randint(max(classes - 1, 2), (examples,), generator=generator)
    outputs = torch.randn(examples, classes, generator=generator)
    outputs[torch.arange(examples), targets] += skill
    return outputs, targets


@pytest.mark.parametrize("classes", [2, 3, 6, 30])
def test_classification(classes: int):
    outputs, targets = labelled(classes)
    figures = metrics_of(Classification(), outputs, targets)
    predicted = outputs.argmax(1)
    assert figures["accuracy"] == pytest.approx(metrics.accuracy_score(targets, predicted))
    assert figures["macro_f1"] == pytest.approx(metrics.f1_score(targets, predicted, average="macro"))
    if classes > 5:
        top = metrics.top_k_accuracy_score(targets, outputs, k=5, labels=range(classes))
        assert figures["top5"] == pytest.approx(top)
    assert ("top5" in figures, "auc" in figures) == (classes > 5, classes == 2)


def test_area_under_the_curve_of_two_classes():
    outputs, targets = labelled(2)
    expected = metrics.roc_auc_score(targets, outputs[:, 1] - outputs[:, 0])
    assert metrics_of(Classification(), outputs, targets)["auc"] == pytest.approx(expected, abs=2e-3)


def tagged(examples: int = 500) -> tuple[Tensor, Tensor]:
    """Return logits [B, 4] correlated with labels [B, 4], rare and frequent ones."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.rand(examples, 4, generator=generator) < torch.tensor([0.02, 0.2, 0.5, 0.9])
    return torch.randn(examples, 4, generator=generator) + 2 * targets - 1, targets.float()


def test_multi_label():
    outputs, targets = tagged()
    figures = metrics_of(MultiLabel(), outputs, targets)
    predicted = outputs > 0
    for average in ("micro", "macro"):
        expected = metrics.f1_score(targets, predicted, average=average)
        assert figures[f"{average}_f1"] == pytest.approx(expected)
    assert figures["auc"] == pytest.approx(metrics.roc_auc_score(targets, outputs, average="macro"), abs=2e-3)
    assert "auc" not in metrics_of(MultiLabel(auc_bins=0), outputs, targets)


def test_without_positives_f1_is_zero():
    """As with scikit-learn's zero_division=0, so that every client has a headline."""
    sums = MultiLabel().score_sums(torch.full((3, 2), -1.0), torch.zeros(3, 2)).sum(0)
    assert MultiLabel().summary(sums, 6)["micro_f1"] == 0.0


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("bins", [64, 1024])
def test_the_error_of_a_histogram_is_at_most_half_the_pairs_in_one_bin(scale: float, bins: int):
    """For logits of any size, also beyond the last bin; without error if no pair shares a bin."""
    outputs, targets = tagged()
    outputs = outputs[:, 2:3] * scale
    histogram = score_histogram(outputs, targets[:, 2:3], bins).double()
    shared = (histogram[:, 0] * histogram[:, 1]).sum() / histogram.sum(2).prod()
    expected = float(metrics.roc_auc_score(targets[:, 2], outputs[:, 0]))
    assert abs(auc(histogram) - expected) <= 0.5 * shared.item() + 1e-12
    if scale in (1e-2, 1.0, 30.0) and bins == 1024:
        assert abs(auc(histogram) - expected) < 2e-3


def test_equal_scores_count_half():
    scores, targets = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0], [1], [1]])
    assert auc(score_histogram(scores, targets).double()) == metrics.roc_auc_score(targets[:, 0], scores[:, 0]) == 0.75


def test_a_label_without_positives_or_negatives_has_no_area():
    assert math.isnan(auc(score_histogram(torch.randn(5, 1), torch.ones(5, 1)).double()))


@pytest.mark.parametrize("numbers", [1, 3])
def test_regression(numbers: int):
    generator = torch.Generator().manual_seed(numbers)
    targets = 5 + torch.randn(300, numbers, generator=generator, dtype=torch.float64)
    outputs = targets + 0.5 * torch.randn(300, numbers, generator=generator, dtype=torch.float64)
    figures = metrics_of(Regression(), outputs, targets)
    assert figures["loss"] == pytest.approx(metrics.mean_squared_error(targets, outputs), rel=1e-12)
    assert figures["mae"] == pytest.approx(metrics.mean_absolute_error(targets, outputs), rel=1e-12)
    assert figures["r2"] == pytest.approx(metrics.r2_score(targets, outputs), rel=1e-9)


def test_r2_of_targets_far_from_zero():
    """A mean of 1e4 deviations costs 8 of 16 digits; targets that do not vary have no R2."""
    targets = 1e4 + np.random.default_rng(0).standard_normal(300)
    outputs = targets + 0.3
    sums = torch.tensor([[300.0, targets.sum(), (targets**2).sum(), 300 * 0.09]], dtype=torch.float64)
    assert r2(sums) == pytest.approx(metrics.r2_score(targets, outputs), rel=1e-5)
    assert math.isnan(r2(torch.tensor([[4.0, 8.0, 16.0, 1.0]])))


def test_the_custom_task_of_the_documentation():
    """docs/tasks-and-models.md: all members, and the metrics of counts 1, 3 at rates 2, 2."""
    page = (Path(__file__).parents[3] / "docs/tasks-and-models.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    task = names["Poisson"]()
    assert [verb for verb in REQUIRED_METHODS if not hasattr(task, verb)] == []
    outputs, targets = torch.full((2, 1), math.log(2.0)), torch.tensor([1.0, 3.0])
    figures = metrics_of(task, outputs, targets)
    assert figures == pytest.approx({"loss": 2 - 2 * math.log(2.0), "relative_error": 2 / 4})
    assert task.loss_sum(outputs, targets).item() / 2 == pytest.approx(figures["loss"])
