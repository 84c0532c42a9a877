"""Language modelling: the next token at each position."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.tasks.base import IGNORED, shape_mismatch, to_full_precision, type_mismatch, weighted_sum


class LanguageModelling:
    """Cross-entropy over outputs [B, T, vocabulary] and int64 targets [B, T]; perplexity. A unit is a token.

    Targets of -100 are ignored, and do not count.

    token_bytes: bytes of each token, int64 [vocabulary], for bits a byte: the loss in bits, over the bytes of the
        targets. None: they are not known.
    """

    scores = ("perplexity", "bits_per_byte")
    headline = "perplexity"
    unit_name = "token"
    has_confusion = False

    def __init__(self, token_bytes: np.ndarray | None = None):
        self.token_bytes = None if token_bytes is None else torch.from_numpy(token_bytes)

    def units(self, targets: Tensor) -> int:
        return targets.shape[1]

    def counted_units(self, targets: Tensor) -> Tensor:
        """Return the number of targets of each example that are not ignored, [B]."""
        return (targets != IGNORED).sum(1)

    def loss_sum(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")
        losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return weighted_sum(losses.view_as(targets), weights)

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(to_full_precision(outputs.flatten(0, 1)), targets.flatten(), reduction="none")
        sums = losses.view_as(targets).double().sum(1, keepdim=True)
        return sums if self.token_bytes is None else torch.cat((sums, self._count_bytes(targets).to(sums)), 1)

    def _count_bytes(self, targets: Tensor) -> Tensor:
        """Return the bytes of the targets of each example, int64 [B, 1]."""
        assert self.token_bytes is not None
        counts = F.pad(self.token_bytes, (0, 1))  # the last is of ignored targets
        return counts[targets.cpu().clamp(min=-1)].sum(1, keepdim=True)

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        total, *sizes = sums.tolist()
        loss = total / units if units else math.nan
        scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # finite in float64
        for size in sizes:  # tokens that end a document take bits, and have no bytes
            scores["bits_per_byte"] = total / math.log(2) / size if size else math.nan
        return scores

    def pooled_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {}

    def pooled_summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {}

    def mismatch(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        if outputs.dim() != 3 or targets.dim() != 2 or outputs.shape[:2] != targets.shape:
            expected = "language modelling expects outputs [batch, length, vocabulary] and targets [batch, length]"
            return shape_mismatch(outputs, targets, expected)
        if classes and outputs.shape[2] < classes:  # published models have more, a multiple of 64
            return (
                f"{outputs.shape[2]} outputs, but the vocabulary has {classes}: set model.vocabulary={classes}, or "
                f"model.config.vocab_size={classes}"
            )
        return type_mismatch(outputs, targets, are_labels=True)
