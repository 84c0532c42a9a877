"""What a loss sum is multiplied by, so that the mean over the replicas is the mean over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed.topology import Topology


class LossNormalizer(dict[float, Tensor]):
    """By the units of a silo's whole batch: replicas / units, from which the gradient of a loss sum starts.

    DDP averages over the replicas; so each brings its sum, times their number, over the units of the silo's batch.
    """

    def __init__(self, topology: Topology, dtype: torch.dtype):
        super().__init__()
        self.topology, self.dtype = topology, dtype

    def __missing__(self, units: float) -> Tensor:
        # A batch whose examples all weigh nothing has no gradient.
        value = self.topology.num_replicas / units if units else 0.0
        share = torch.tensor(value, dtype=self.dtype, device=self.topology.device)
        if isinstance(units, int):  # sums of weights hardly come twice
            self[units] = share
        return share
