"""What wires that lose something of each vector, and send it with the next one, have in common."""

from __future__ import annotations

from torch import Tensor

from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import Plain, Rule, SeedFor
from trainer.distributed.transport.error_feedback import Residuals


class Lossy:
    """Vectors are cut, and joined inside the silo, as by the plain wire; what is lost is kept in `residuals`."""

    stateful = True

    def __init__(self, topology: Topology):
        self.topology = topology
        self.plain = Plain(topology)
        self.residuals = Residuals()
        self.unit = self.plain.unit
        self.bytes_sent = 0

    @property
    def seconds_waited(self) -> float:
        return self.plain.seconds_waited

    def begin_round(self, seed_for: SeedFor) -> None:
        self.seed_for = seed_for

    def parts(self, length: int) -> list[slice]:
        return self.plain.parts(length)

    def ahead(self, vector: Tensor, name: str) -> Tensor:
        if self.topology.num_silos == 1:
            return vector
        return self.join(self.residuals.subtract(name, vector.clone()))

    def join(self, vector: Tensor) -> Tensor:
        return self.plain.join(vector)

    def add_up(self, value: float) -> float:
        return self.plain.add_up(value)

    def bytes_of_rows(self, rows: Tensor, count: int) -> int:
        raise AssertionError("a Run packs nothing that is not summed")

    def by_columns(self, rows: Tensor, rule: Rule) -> Tensor:
        raise AssertionError("a Run packs nothing that is not summed")
