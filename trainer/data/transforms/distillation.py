"""The inputs of a teacher: what a student's random transforms make of the raw examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.sources.base import Source
from trainer.data.transforms.base import Examples
from trainer.data.transforms.compose import Compose


@dataclass(frozen=True)
class ComposeForTeacher(Compose):
    """Transforms of a student. In training its targets become pairs: the targets, and the inputs of its teacher.

    Both see the same crop of the same example (Beyer et al. 2022, arXiv 2106.05237): random transforms draw the same
    numbers for both. The others, such as a normalization by the student's statistics, are left out for the teacher,
    which has its own. It takes raw inputs, as an exported model does.
    """

    def for_training(
        self,
        source: Source,
        ids: Tensor,
        members: Tensor,
        seed: int,
        epoch: int,
        device: torch.device,
        examples: Examples | None = None,
    ) -> Examples:
        inputs, targets = super().for_training(source, ids, members, seed, epoch, device, examples)
        random = {name: transform for name, transform in self.transforms.items() if transform.is_random}
        of_teacher = Compose(random, self.classes, self.channels_last, self.keys)
        seen, _ = of_teacher.for_training(source, ids, members, seed, epoch, device, examples)
        return inputs, (targets, seen)
