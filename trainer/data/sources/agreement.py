"""How silos that have examples of their own agree on what is measured of all examples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from trainer.distributed import collectives
from trainer.distributed.topology import Topology


class Agreement(Protocol):
    """How numbers that silos have measured of their own examples are put together.

    All ranks make the same calls. Only what a silo gives to them leaves it, and only the result reaches the others.
    """

    def union(self, name: str, sets: list[list[str]]) -> list[list[str]]:
        """Return the sorted union of each set over the silos.

        Args:
            name: of the call; no other one of the run has it.
            sets: equally many in each silo.
        """
        ...

    def total(self, name: str, sums: np.ndarray) -> np.ndarray:
        """Return the sum of the numbers over the silos.

        Args:
            name: of the call; no other one of the run has it.
            sums: of one shape and dtype in each silo.
        """
        ...


class Alone:
    """The agreement on examples that are all here."""

    def union(self, name: str, sets: list[list[str]]) -> list[list[str]]:
        return sets

    def total(self, name: str, sums: np.ndarray) -> np.ndarray:
        return sums


@dataclass(frozen=True)
class BetweenSilos:
    """The agreement of silos of one world, for each of which its leader speaks."""

    topology: Topology

    def union(self, name: str, sets: list[list[str]]) -> list[list[str]]:
        sent = sets if self.topology.is_leader else [[] for _ in sets]
        gathered = map(json.loads, dict.fromkeys(collectives.all_gather_texts(json.dumps(sent))))
        return [sorted(set().union(*column)) for column in zip(*gathered, strict=True)]

    def total(self, name: str, sums: np.ndarray) -> np.ndarray:
        sent = torch.from_numpy(sums if self.topology.is_leader else np.zeros_like(sums))
        return collectives.all_reduce_sum(sent).numpy()
