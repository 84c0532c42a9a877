"""From the choice of an uplink to its wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.codecs import Full, PowerSGD, Uplink
from trainer.topology import Topology
from trainer.wires.lowrank import LowRank
from trainer.wires.packed import Packed
from trainer.wires.wire import Plain, Wire


def wire_of(topology: Topology, uplink: Uplink, places: Sequence[tuple[int, torch.Size]]) -> Wire:
    """The wire over which what this uplink makes of vectors goes between the silos.

    `places` are those of the parameters in a vector: where each starts, and its shape.
    """
    if isinstance(uplink, Full):
        return Plain(topology)
    if isinstance(uplink, PowerSGD):
        return LowRank(topology, uplink.rank, places)
    return Packed(topology, uplink)
