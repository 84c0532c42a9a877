"""What wires that lose something of each vector, and send it with the next one, have in common."""

from __future__ import annotations

from torch import Tensor

from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import AllReduce, ColumnReduction, SeedFor
from trainer.distributed.transport.error_feedback import Residuals


class ErrorFeedbackTransport:
    """Vectors are cut, and joined inside the silo, as by the plain wire; what is lost is kept in `residuals`."""

    stateful = True

    def __init__(self, topology: Topology):
        self.topology = topology
        self.all_reduce = AllReduce(topology)
        self.residuals = Residuals()
        self.alignment = self.all_reduce.alignment
        self.bytes_sent = 0

    @property
    def wait_seconds(self) -> float:
        return self.all_reduce.wait_seconds

    def start_round(self, seed_for: SeedFor) -> None:
        self.seed_for = seed_for

    def chunks(self, length: int) -> list[slice]:
        return self.all_reduce.chunks(length)

    def lookahead(self, vector: Tensor, name: str) -> Tensor:
        if self.topology.num_silos == 1:
            return vector
        return self.all_gather(self.residuals.subtract(name, vector.clone()))

    def all_gather(self, vector: Tensor) -> Tensor:
        return self.all_reduce.all_gather(vector)

    def sum_over_shards(self, value: float) -> float:
        return self.all_reduce.sum_over_shards(value)

    def reduce_columns_bytes(self, rows: Tensor, count: int) -> int:
        raise AssertionError("a Run packs nothing that is not summed")

    def reduce_columns(self, rows: Tensor, rule: ColumnReduction) -> Tensor:
        raise AssertionError("a Run packs nothing that is not summed")
