"""The global statistics of normalization layers, from which every client starts its round."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.models.flat import FlatModel


class GlobalStatistics:
    """The pooled statistics of the last round, and the integer counters beside them.

    Attributes:
        vector: the statistics as float64 [k], see BufferStatistics.
        counts: the counters [m].
    """

    def __init__(self, model: FlatModel, topology: Topology):
        self.model, self.topology = model, topology
        self.take_from_model()

    def take_from_model(self) -> None:
        """Set the statistics to those that the model has now."""
        self.vector, self.counts = self.model.statistics.vector(), self.model.statistics.counts()

    def reset_model(self) -> None:
        """Give the model the statistics with which all clients of this round started."""
        if self.model.statistics.has_buffers:
            self.model.statistics.load(self.vector, self.counts)

    def pool(self, vector: Tensor, counts: Tensor) -> None:
        """Set the statistics, and those of the model, to the mean over all clients.

        Args:
            vector: the mean [k].
            counts: the largest counts [m].
        """
        if not self.model.statistics.has_buffers:
            return
        self.vector, self.counts = vector, counts
        self.reset_model()

    def are_finite(self) -> bool:
        """Return whether the statistics of all replicas of the silo are free of NaN and infinity. A collective."""
        statistics = (self.model.statistics, self.model.personal_statistics)
        vectors = [part.vector() for part in statistics if part.has_buffers]
        if not vectors:
            return True
        total = torch.cat(vectors).sum()
        return bool(collectives.all_reduce_mean_in_silo(total, self.topology).isfinite())

    def average_personal(self) -> None:
        """Make the personal buffers of the silo's replicas equal: average statistics, take others from the first one.

        A collective.
        """
        statistics, buffers = self.model.personal_statistics, self.model.personal_buffers
        if statistics.has_buffers:
            mean = collectives.all_reduce_mean_in_silo(statistics.vector(), self.topology)
            statistics.load(mean, statistics.counts())
        others = [buffer for name, buffer in buffers.items() if name not in statistics.names]
        collectives.broadcast_in_silo(others, self.topology)
