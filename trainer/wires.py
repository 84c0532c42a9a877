"""How numbers travel between silos. What changes numbers is a transform; a wire only moves and combines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trainer import comm
from trainer.topology import Topology

# From rows [K, n] of all silos' vectors, of which these are some columns, to one row [n]. The second argument sums a
# small tensor over those who have the other columns, in place.
Rule = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


class Wire(Protocol):
    """Abstract: combines one vector, or several rows, of every silo. Every rank must come to each call."""

    bytes_sent: int

    def sum(self, vector: Tensor) -> Tensor:
        """The sum over the silos, in place and bit-equal on all ranks."""
        ...

    def by_columns(self, rows: Tensor, rule: Rule) -> Tensor:
        """What the rule makes of all silos' rows [k, n], k each silo's own: one row [n], bit-equal on all ranks.

        Every silo applies the rule to a part of the columns: nobody holds all rows whole.
        """
        ...


class Plain:
    """The vectors as they are: one all-reduce, or one exchange of columns."""

    def __init__(self, topology: Topology):
        self.topology = topology
        self.bytes_sent = 0

    def sum(self, vector: Tensor) -> Tensor:
        if self.topology.num_silos == 1 or vector.numel() == 0:
            return vector
        # A ring all-reduce sends every byte 2 (S - 1) / S times from each of the S silos.
        self.bytes_sent += 2 * (self.topology.num_silos - 1) * vector.numel() * vector.element_size()
        return comm.sum_between_silos(vector, self.topology)

    def by_columns(self, rows: Tensor, rule: Rule) -> Tensor:
        silos = self.topology.num_silos
        if silos == 1:
            return rule(rows, lambda tensor: tensor)
        counts = comm.counts_of_silos(len(rows), self.topology)
        width = -(-rows.shape[1] // silos)
        columns = rows.new_zeros(width)
        # Of every row all but one of S parts leave their silo; of the result each part goes to all others.
        self.bytes_sent += (sum(counts) + silos) * (silos - 1) * width * rows.element_size()
        if self.topology.is_leader:
            parts = torch.nn.functional.pad(rows, (0, width * silos - rows.shape[1])).view(-1, silos, width)
            received = comm.exchange_between_silos(parts.transpose(0, 1).contiguous(), counts, self.topology)
            columns = rule(received, lambda tensor: comm.sum_between_leaders(tensor, self.topology))
        return comm.join_silos(columns, self.topology)[: rows.shape[1]]
