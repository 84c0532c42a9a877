"""From the choice of an uplink to its wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.distributed.compression import Full, PowerSGD, Uplink
from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import Plain, Wire
from trainer.distributed.transport.compressed import Packed
from trainer.distributed.transport.low_rank import LowRank


def wire_of(topology: Topology, uplink: Uplink, places: Sequence[tuple[int, torch.Size]]) -> Wire:
    """The wire over which what this uplink makes of vectors goes between the silos.

    `places` are those of the parameters in a vector: where each starts, and its shape.
    """
    if isinstance(uplink, Full):
        return Plain(topology)
    if isinstance(uplink, PowerSGD):
        return LowRank(topology, uplink.rank, places)
    return Packed(topology, uplink)
