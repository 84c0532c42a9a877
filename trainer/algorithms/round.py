"""A round, equal on every rank: its index, its seeds, and the clients that take part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.utils.seeding import Tag, derive_seed


@dataclass(frozen=True)
class Round:
    """One tick of the shared clock: its index, the seed of the run, and the clients that take part, ascending."""

    index: int
    seed: int
    cohort: tuple[int, ...]

    def seed_for(self, *tags: Tag) -> int:
        """The seed of a random stream of this round."""
        return derive_seed(self.seed, "round", self.index, *tags)

    def generator(self, *tags: Tag) -> torch.Generator:
        """A CPU generator of a random stream of this round."""
        return torch.Generator().manual_seed(self.seed_for(*tags))
