"""A round, equal on every rank: its index, its seeds, and the clients that take part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.utils.seeding import Tag, derive_seed


@dataclass(frozen=True)
class Round:
    """A round.

    Attributes:
        index: counted from 0.
        seed: of the run.
        cohort: the clients that take part, ascending.
    """

    index: int
    seed: int
    cohort: tuple[int, ...]

    def seed_for(self, *tags: Tag) -> int:
        """Return the seed of a random stream of this round."""
        return derive_seed(self.seed, "round", self.index, *tags)

    def generator(self, *tags: Tag) -> torch.Generator:
        """Return a CPU generator for a random stream of this round."""
        return torch.Generator().manual_seed(self.seed_for(*tags))
