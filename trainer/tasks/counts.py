"""Scores that are no means over examples, from sums that are: F1 from counts, R2 from squares, AUC from histograms.

All take float64 sums; a score that cannot be made from them is NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 1024  # of a histogram of scores
STEEPNESS, LARGEST = 100.0, 40.0  # of a logit


def mean(total: Tensor, count: Tensor) -> float:
    """total / count, both scalars."""
    return (total / count).item() if count else math.nan


def f1(counts: Tensor) -> Tensor:
    """2 right / (predicted + there) from counts [..., 3] of these; NaN where there is neither."""
    right, predicted, there = counts.unbind(-1)
    return 2 * right / (predicted + there)


def macro_f1(counts: Tensor) -> float:
    """The mean F1 of the classes that occur or are predicted, from counts [classes, 3]."""
    return f1(counts).nanmean().item()


def r2(sums: Tensor) -> float:
    """1 - sum (y - f)^2 / sum (y - mean y)^2, the mean over the numbers whose targets y vary.

    From sums [numbers, 4] of 1, y, y^2 and (y - f)^2. The denominator is sum y^2 - (sum y)^2 / n: of its 16 digits it
    loses as many as (mean y)^2 has more than the variance.
    """
    count, first, second, errors = sums.unbind(1)
    spread = second - first.square() / count
    varies = spread > 1e-12 * second
    return (1 - errors[varies] / spread[varies]).mean().item()


def score_histogram(logits: Tensor, targets: Tensor, bins: int = BINS) -> Tensor:
    """How many negatives and positives have their score in each bin: int64 [labels, 2, bins].

    Of logits and targets of 0 and 1, both [B, labels] on the CPU. Bins are equal in asinh(100 logit), for logits of up
    to 40 either way: with 1,024 of them they are 0.0002 wide at 0 and 2 % of a logit that is far from it.
    """
    scaled = torch.asinh(STEEPNESS * logits.nan_to_num(0.0)) / math.asinh(STEEPNESS * LARGEST)
    places = ((scaled + 1) / 2 * bins).long().clamp_(0, bins - 1)
    labels = torch.arange(logits.shape[1])
    cells = (labels * 2 + (targets > 0)) * bins + places
    counts = torch.bincount(cells.flatten(), minlength=2 * bins * logits.shape[1])
    return counts.view(logits.shape[1], 2, bins)


def auc(histograms: Tensor) -> float:
    """The chance that a positive has a higher score than a negative, the mean over labels that have both.

    From histograms [labels, 2, bins]. A pair in one bin counts half: so it is off by half the part of the pairs that
    are in one bin, at most.
    """
    negatives, positives = histograms.unbind(1)
    below = negatives.cumsum(1) - 0.5 * negatives
    pairs = negatives.sum(1) * positives.sum(1)
    return ((positives * below).sum(1) / pairs).nanmean().item()
