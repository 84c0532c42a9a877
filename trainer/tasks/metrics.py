"""Metrics made from sums over examples: F1 from counts, R2 from squares, AUC from counts of scores, and so on.

All take float64 sums and return NaN where the metric is not defined.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = 1 << 32  # numbers of a float32
BINS = 15  # of a calibration error, as in Guo et al. 2017


def mean(total: Tensor, count: Tensor) -> float:
    """Return total / count, both scalars."""
    return (total / count).item() if count else math.nan


def f1(counts: Tensor) -> Tensor:
    """Return F1 from counts [..., 3] of true positives, predicted positives, and positives."""
    true_positives, predicted, positives = counts.unbind(-1)
    return 2 * true_positives / (predicted + positives)


def macro_f1(counts: Tensor) -> float:
    """Return the mean F1 over the classes that occur or are predicted, from counts [classes, 3] as for `f1`."""
    return f1(counts).nanmean().item()


def sensitivity(counts: Tensor) -> float:
    """Return the true positives among the positives, from counts [classes, 3] as for `f1`: the mean over classes."""
    true_positives, _, positives = counts.unbind(-1)
    return (true_positives / positives).nanmean().item()


def specificity(counts: Tensor, examples: Tensor) -> float:
    """Return the true negatives among the negatives of this many examples, from counts as for `sensitivity`."""
    true_positives, predicted, positives = counts.unbind(-1)
    return ((examples - positives - predicted + true_positives) / (examples - positives)).nanmean().item()


def calibration_sums(confidences: Tensor, correct: Tensor) -> Tensor:
    """Sum predictions by their confidence: float64 [BINS, 3] of their number, of the confidences, of the correct ones.

    Bin m has the confidences in ((m - 1) / BINS, m / BINS].

    Args:
        confidences: of the predictions, in [0, 1], [N] on the CPU.
        correct: whether each is right, [N] on the CPU.
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=confidences.dtype)[1:-1]
    columns = (torch.ones_like(confidences), confidences, correct)
    rows = torch.stack([column.double() for column in columns], 1)
    return torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, torch.bucketize(confidences, edges), rows)


def calibration_error(sums: Tensor) -> float:
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 5) from `calibration_sums`.

    It is sum_m |B_m| / n |accuracy(B_m) - confidence(B_m)|.
    """
    counts, confidences, correct = sums.unbind(1)
    return mean((correct - confidences).abs().sum(), counts.sum())


def r2(sums: Tensor) -> float:
    """Return 1 - sum (y - f)^2 / sum (y - mean y)^2, the mean over the numbers whose targets y vary.

    Args:
        sums: [numbers, 4], sums over examples of 1, y, y^2, and (y - f)^2.
    """
    count, first, second, errors = sums.unbind(1)
    # Cancellation: of 16 digits, this loses as many as (mean y)^2 has more than the variance.
    spread = second - first.square() / count
    varies = spread > 1e-12 * second
    return (1 - errors[varies] / spread[varies]).mean().item()


def score_counts(scores: Tensor, targets: Tensor) -> Tensor:
    """Return how many negatives and positives have each score, by label: sparse int64 [labels, FLOATS, 2].

    The second index is the position of the score among all float32 numbers. So counts of any scores add up, and only
    those that occur take memory.

    Args:
        scores: [B, labels] on the CPU; NaN counts as 0.
        targets: 0 or 1, [B, labels] on the CPU.
    """
    bits = (scores.float().nan_to_num(0.0, math.inf, -math.inf) + 0.0).view(torch.int32).long()  # -0 is 0
    # The bits of positive numbers grow with the number, those of negative ones with its magnitude.
    order = torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + FLOATS // 2
    labels = torch.arange(scores.shape[1]).expand_as(order)
    is_positive = (targets > 0).flatten()
    counts = torch.stack((~is_positive, is_positive), 1).long()
    cells = torch.stack((labels.flatten(), order.flatten()))
    return torch.sparse_coo_tensor(cells, counts, (scores.shape[1], FLOATS, 2), check_invariants=False)


def auc(counts: Tensor) -> float:
    """Return the area under the ROC curve, the mean over labels that have positives and negatives.

    It is the probability that a positive has a higher score than a negative; of pairs with the same score, half count.

    Args:
        counts: [labels, FLOATS, 2], see `score_counts`.
    """
    counts = counts.coalesce()
    labels, (negatives, positives) = counts.indices()[0], counts.values().double().unbind(1)
    negatives_of, positives_of = _by_label(negatives, labels, counts), _by_label(positives, labels, counts)
    below = negatives.cumsum(0) - 0.5 * negatives - (negatives_of.cumsum(0) - negatives_of)[labels]
    return (_by_label(positives * below, labels, counts) / (negatives_of * positives_of)).nanmean().item()


def merge_scores(counts: Tensor, limit: int) -> Tensor:
    """Merge scores next to each other, until a label has at most `limit`: groups of about the same number of examples.

    The order of the groups is that of their scores, so only pairs within a group are no longer told apart.
    """
    counts = counts.coalesce()
    (labels, order), values = counts.indices(), counts.values()
    if not len(labels) or int(labels.bincount().max()) <= limit:
        return counts
    weights = values.sum(1).double()
    weights_of = _by_label(weights, labels, counts)
    middle = weights.cumsum(0) - 0.5 * weights - (weights_of.cumsum(0) - weights_of)[labels]
    group = (middle / weights_of[labels] * limit).long().clamp_(max=limit - 1) + labels * limit
    group = group.unique_consecutive(return_inverse=True)[1]
    merged = values.new_zeros(int(group[-1]) + 1, 2).index_add_(0, group, values)
    # The mean position stands for the group.
    centre = weights.new_zeros(len(merged)).index_add_(0, group, weights * order) / merged.sum(1)
    first = torch.cat([group.new_tensor([0]), (group.diff() > 0).nonzero()[:, 0] + 1])
    cells = torch.stack((labels[first], centre.long()))
    return torch.sparse_coo_tensor(cells, merged, counts.shape, check_invariants=False).coalesce()


def _by_label(values: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Sum float64 values by label, [labels]."""
    return values.new_zeros(len(counts)).index_add_(0, labels, values)
