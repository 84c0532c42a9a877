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

from trainer.loop.pooled_sums import SCORES, PooledSums, totals
from trainer.tasks import REQUIRED_METHODS, Classification, MultiLabel, Regression, Task
from trainer.tasks.metrics import auc, calibration_sums, merge_scores, r2, score_counts


def metrics_of(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return all metrics, from the sums of three parts of the examples, one of them empty."""
    edges = (0, len(outputs) // 3, len(outputs) // 3, len(outputs))
    parts = [slice(a, b) for a, b in pairwise(edges)]
    rows = sum(task.score_sums(outputs[part], targets[part]).sum(0) for part in parts)
    assert isinstance(rows, Tensor)
    sums = [task.pooled_sums(outputs[part], targets[part]) for part in parts]
    pooled = [PooledSums(one) for one in sums]
    for mine, one in zip(pooled, sums, strict=True):
        mine.add(one)
    tables = [mine.tables(rank, 3) for rank, mine in enumerate(pooled)]
    total = {name: torch.stack([table[name] for table in tables]).sum(0) for name in tables[0]}
    return task.summary(rows, task.units(targets) * len(targets)) | task.pooled_summary(totals(total))


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
    recalls = metrics.recall_score(targets, predicted, average=None, zero_division=math.nan)
    assert figures["sensitivity"] == pytest.approx(recalls[1] if classes == 2 else np.nanmean(recalls))
    true_negatives = [np.mean(predicted[targets != label].numpy() != label) for label in range(classes)]
    assert figures["specificity"] == pytest.approx(true_negatives[1] if classes == 2 else np.mean(true_negatives))
    confidences, _ = outputs.softmax(1).max(1)
    expected = calibration_error_of_guo(confidences, predicted.eq(targets))
    assert figures["calibration_error"] == pytest.approx(expected, abs=1e-7)
    if classes > 5:
        top = metrics.top_k_accuracy_score(targets, outputs, k=5, labels=range(classes))
        assert figures["top5"] == pytest.approx(top)
    assert ("top5" in figures, "auc" in figures) == (classes > 5, classes == 2)


def calibration_error_of_guo(confidences: Tensor, accuracies: Tensor) -> float:
    """Return the error as the authors compute it, github.com/gpleiss/temperature_scaling."""
    bin_boundaries = torch.linspace(0, 1, 16)
    ece = torch.zeros(1)
    for bin_lower, bin_upper in pairwise(bin_boundaries):
        in_bin = confidences.gt(bin_lower.item()) * confidences.le(bin_upper.item())
        prop_in_bin = in_bin.float().mean()
        if prop_in_bin.item() > 0:
            accuracy_in_bin = accuracies[in_bin].float().mean()
            avg_confidence_in_bin = confidences[in_bin].mean()
            ece += torch.abs(avg_confidence_in_bin - accuracy_in_bin) * prop_in_bin
    return ece.item()


def test_confidences_at_the_edge_of_a_bin_belong_to_the_lower_one():
    confidences = torch.tensor([1 / 15, 1 / 3, 1.0])
    assert calibration_sums(confidences, torch.ones(3, dtype=torch.bool))[:, 0].nonzero().flatten().tolist() == [
        0,
        4,
        14,
    ]


def test_area_under_the_curve_of_two_classes():
    outputs, targets = labelled(2)
    expected = metrics.roc_auc_score(targets, outputs[:, 1] - outputs[:, 0])
    assert metrics_of(Classification(), outputs, targets)["auc"] == pytest.approx(expected, abs=1e-12)


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
    assert figures["auc"] == pytest.approx(metrics.roc_auc_score(targets, outputs, average="macro"), abs=1e-12)
    assert figures["sensitivity"] == pytest.approx(metrics.recall_score(targets, predicted, average="macro"))
    expected = metrics.recall_score(1 - targets, ~predicted, average="macro")
    assert figures["specificity"] == pytest.approx(expected)
    probabilities, right = outputs.sigmoid().flatten(), (predicted == targets.bool()).flatten()
    expected = calibration_error_of_guo(torch.maximum(probabilities, 1 - probabilities), right)
    assert figures["calibration_error"] == pytest.approx(expected, abs=1e-6)
    assert "auc" not in metrics_of(MultiLabel(auc=False), outputs, targets)


def test_without_positives_f1_is_zero():
    """As with scikit-learn's zero_division=0, so that every client has a headline."""
    sums = MultiLabel().score_sums(torch.full((3, 2), -1.0), torch.zeros(3, 2)).sum(0)
    assert MultiLabel().summary(sums, 6)["micro_f1"] == 0.0


def scored(scale: float, shift: float, examples: int) -> tuple[Tensor, Tensor]:
    """Return scores [B, 3] of this size and place, and labels, rare and frequent ones."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.rand(examples, 3, generator=generator) < torch.tensor([0.02, 0.5, 0.9])
    return (torch.randn(examples, 3, generator=generator) + 0.5 * targets) * scale + shift, targets.long()


@pytest.mark.parametrize(("scale", "shift"), [(1e-30, 0), (1e-3, 98), (1, 0), (1, -1e4), (1e6, 0), (1e30, 0)])
def test_the_area_is_that_of_ranks_at_any_scale(scale: float, shift: float):
    """Exactly for as many scores as are kept; to 1e-4 where neighbours are merged, to one of twelve."""
    outputs, targets = scored(scale, shift, 6000)
    expected = metrics.roc_auc_score(targets, outputs, average="macro")
    counts = score_counts(outputs, targets)
    assert auc(counts) == pytest.approx(expected, abs=1e-12)
    merged = merge_scores(counts, 512)
    assert merged._nnz() <= 3 * 512
    assert merged.values().sum(0).tolist() == [int((targets == 0).sum()), int(targets.sum())]
    assert auc(merged) == pytest.approx(expected, abs=1e-4)


def test_ranks_that_merge_their_scores_find_the_area_to_1e_4():
    """Three ranks hold more scores than they exchange, and one of them holds most."""
    outputs, targets = scored(1e-3, 98, 4 * SCORES)
    expected = metrics.roc_auc_score(targets, outputs, average="macro")
    assert metrics_of(MultiLabel(), outputs, targets)["auc"] == pytest.approx(expected, abs=1e-4)


def test_the_scores_of_torchmetrics_issue_2819():
    """Large logits that are close to each other, at which a histogram of fixed bins finds 0.5."""
    scores = [98.0950, 98.4612, 98.1145, 98.1506, 97.6037, 98.9425, 99.2644, 99.5014]
    scores += [99.7280, 99.6595, 99.6931, 99.4667, 99.9623, 99.8949, 99.8768]
    outputs = torch.tensor(scores).double()
    targets = torch.tensor([0] + [1] * 14)
    figures = metrics_of(Classification(), torch.stack([torch.zeros(15), outputs], 1).float(), targets)
    assert figures["auc"] == pytest.approx(13 / 14, abs=1e-12)


def test_tables_come_in_one_order_on_all_ranks():
    """Ranks add them up one after the other; the order of a set differs from process to process."""
    sums = {name: torch.zeros(2) for name in "dacb"} | {"scores": score_counts(torch.zeros(1, 1), torch.zeros(1, 1))}
    assert list(PooledSums(sums).tables(0, 2)) == ["d", "a", "c", "b", "scores rows"]


def test_scores_of_no_number_have_a_place():
    """Infinities are the largest and the smallest, and zero has one sign; NaN counts as zero."""
    scores = torch.tensor([[math.inf], [-math.inf], [-0.0], [math.nan], [0.0]])
    targets = torch.tensor([[1], [0], [1], [0], [1]])
    assert auc(score_counts(scores, targets)) == pytest.approx((2 + 1.5 + 1.5) / 6)


def test_equal_scores_count_half():
    scores, targets = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0], [1], [1]])
    assert auc(score_counts(scores, targets)) == metrics.roc_auc_score(targets[:, 0], scores[:, 0]) == 0.75


def test_a_label_without_positives_or_negatives_has_no_area():
    assert math.isnan(auc(score_counts(torch.randn(5, 1), torch.ones(5, 1))))


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
