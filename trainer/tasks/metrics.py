"""Metrics made from sums over examples: F1 from counts, R2 from squares, AUC from histograms.

All take float64 sums and return NaN where the metric is not defined.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 1024  # of a histogram of logits
STEEPNESS, LARGEST_LOGIT = 100.0, 40.0  # of the spacing of the bins


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


def score_histogram(logits: Tensor, targets: Tensor, bins: int = BINS) -> Tensor:
    """Return a histogram of the logits of negatives and of positives for each label, int64 [labels, 2, bins].

    Bins are uniform in asinh(100 logit) for logits in [-40, 40]. 1,024 bins are 0.0002 wide at 0, and 2 % of the logit
    far from 0.

    Args:
        logits: [B, labels] on the CPU.
        targets: 0 or 1, [B, labels] on the CPU.
        bins: number of bins.
    """
    scaled = torch.asinh(STEEPNESS * logits.nan_to_num(0.0)) / math.asinh(STEEPNESS * LARGEST_LOGIT)
    bin_index = ((scaled + 1) / 2 * bins).long().clamp_(0, bins - 1)
    labels = torch.arange(logits.shape[1])
    cells = (labels * 2 + (targets > 0)) * bins + bin_index
    counts = torch.bincount(cells.flatten(), minlength=2 * bins * logits.shape[1])
    return counts.view(logits.shape[1], 2, bins)


def auc(histograms: Tensor) -> float:
    """Return the area under the ROC curve, the mean over labels that have positives and negatives.

    It is the probability that a positive has a higher logit than a negative. A pair in one bin counts half, so the
    error is at most half the fraction of such pairs.

    Args:
        histograms: [labels, 2, bins], see `score_histogram`.
    """
    negatives, positives = histograms.unbind(1)
    below = negatives.cumsum(1) - 0.5 * negatives
    pairs = negatives.sum(1) * positives.sum(1)
    return ((positives * below).sum(1) / pairs).nanmean().item()
