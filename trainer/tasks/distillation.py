"""Distillation: classification that learns from the labels, and from a trained model."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.tasks.base import to_full_precision, weighted_sum
from trainer.tasks.classification import Classification, ClassWeights
from trainer.utils.tensor_trees import Tree


class Teacher(Protocol):
    """Abstract: a trained model, which never changes."""

    @property
    def fingerprint(self) -> str:
        """A hash of it."""
        ...

    def __call__(self, inputs: Tree) -> Tensor:
        """Return the logits [B, classes] of raw inputs."""
        ...


class Distillation(Classification):
    """Classification whose loss is (1 - w) CE(labels) + w T² KL(teacher || student).

    The two distributions of the divergence are the softmax of logits divided by the temperature T. Its gradient shrinks
    as 1 / T², which the factor makes up for. Hinton, Vinyals and Dean 2015, arXiv 1503.02531.

    Targets of training are pairs, which `ComposeForTeacher` makes: labels [B] or probabilities [B, classes], and the
    inputs of the teacher. Those of evaluation are labels, and loss and scores are those of `Classification`.

    Args:
        teacher: answers in training; None for evaluation alone.
        temperature: T.
        weight: w.
        class_weights: as of `Classification`; they weigh both terms.

    Attributes:
        fingerprint: of the teacher.
    """

    def __init__(
        self,
        teacher: Teacher | None = None,
        temperature: float = 2.0,
        weight: float = 0.7,
        class_weights: ClassWeights = None,
    ):
        super().__init__(class_weights)
        errors = []
        if not 0 < temperature < math.inf:
            errors.append(f"task.temperature={temperature:g}\n  valid: a finite number above 0")
        if not 0 <= weight <= 1:
            errors.append(f"task.weight={weight:g}\n  valid: from 0 to 1")
        if errors:
            raise ValueError("\n".join(errors))
        self.teacher, self.temperature, self.weight = teacher, temperature, weight
        self.fingerprint = teacher.fingerprint if teacher else ""

    def loss_sum(self, outputs: Tensor, targets: Tree, weights: Tensor | None = None) -> Tensor:
        labels, inputs = targets
        of_labels = super().loss_sum(outputs, labels, weights)
        divergences = self._divergences(outputs, inputs)
        of_teacher = divergences.sum() if weights is None else weighted_sum(divergences, weights)
        return (1 - self.weight) * of_labels + self.weight * of_teacher

    def _divergences(self, outputs: Tensor, inputs: Tree) -> Tensor:
        """Return T² KL(teacher || student) of each example [B]."""
        assert self.teacher
        with torch.no_grad():
            answers = self._log_probabilities(self.teacher(inputs))
        divergences = F.kl_div(self._log_probabilities(outputs), answers, reduction="none", log_target=True).sum(1)
        return self.temperature**2 * divergences

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return F.log_softmax(to_full_precision(logits) / self.temperature, 1)
