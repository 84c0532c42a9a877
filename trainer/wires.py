"""How numbers travel between silos. What changes numbers is a transform; a wire only moves and adds them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from trainer import comm
from trainer.topology import Topology


class Wire(Protocol):
    """Abstract: sums one vector of every silo."""

    bytes_sent: int

    def sum(self, vector: Tensor) -> Tensor:
        """The sum over the silos, in place and bit-equal on all ranks. Every rank must come here, each round."""
        ...


class Plain:
    """One all-reduce of the vector as it is."""

    def __init__(self, topology: Topology):
        self.topology = topology
        self.bytes_sent = 0

    def sum(self, vector: Tensor) -> Tensor:
        if self.topology.num_silos == 1 or vector.numel() == 0:
            return vector
        # A ring all-reduce sends every byte 2 (S - 1) / S times from each of the S silos.
        self.bytes_sent += 2 * (self.topology.num_silos - 1) * vector.numel() * vector.element_size()
        return comm.sum_between_silos(vector, self.topology)
