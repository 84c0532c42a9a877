"""Tasks: a loss and scores, both made from sums that add up over any split of the examples."""

from __future__ import annotations

from trainer.tasks.base import REQUIRED_METHODS, Task
from trainer.tasks.classification import Classification
from trainer.tasks.distillation import Distillation
from trainer.tasks.language_modelling import LanguageModelling
from trainer.tasks.multi_label import MultiLabel
from trainer.tasks.regression import Regression

__all__ = [
    "REQUIRED_METHODS",
    "Classification",
    "Distillation",
    "LanguageModelling",
    "MultiLabel",
    "Regression",
    "Task",
]
