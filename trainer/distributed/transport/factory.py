"""From the choice of an uplink to its wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.distributed.compression import PowerSGD, Uncompressed, UpdateCompression
from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import AllReduce, Transport
from trainer.distributed.transport.compressed import CompressedAllReduce
from trainer.distributed.transport.low_rank import PowerSGDAllReduce


def make_transport(
    topology: Topology, compression: UpdateCompression, layout: Sequence[tuple[int, torch.Size]]
) -> Transport:
    """The wire over which what this uplink makes of vectors goes between the silos.

    `layout` are those of the parameters in a vector: where each starts, and its shape.
    """
    if isinstance(compression, Uncompressed):
        return AllReduce(topology)
    if isinstance(compression, PowerSGD):
        return PowerSGDAllReduce(topology, compression.rank, layout)
    return CompressedAllReduce(topology, compression)
