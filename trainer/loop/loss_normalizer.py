"""The factor of a loss sum that makes the mean over the replicas the mean over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed.topology import Topology


class LossNormalizer(dict[float, Tensor]):
    """Maps the units of a silo's whole batch to replicas / units, the gradient with which a loss sum starts backward.

    DDP averages over the replicas, so each contributes its sum times their number, over the units of the batch.
    """

    def __init__(self, topology: Topology, dtype: torch.dtype):
        super().__init__()
        self.topology, self.dtype = topology, dtype

    def __missing__(self, units: float) -> Tensor:
        # A batch whose examples all weigh nothing has no gradient.
        value = self.topology.num_replicas / units if units else 0.0
        factor = torch.tensor(value, dtype=self.dtype, device=self.topology.device)
        if isinstance(units, int):  # sums of weights hardly occur twice
            self[units] = factor
        return factor
