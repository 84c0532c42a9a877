"""The transports of each choice of `update_compression=`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.distributed.compression import UpdateCompression
from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import AllReduce, Transport
from trainer.distributed.transport.compressed import CompressedAllReduce
from trainer.distributed.transport.low_rank import PowerSGDAllReduce
from trainer.distributed.transport.upload import CompressedUpload, Upload


def make_upload(topology: Topology, compression: UpdateCompression) -> Upload:
    """Make what sends the vectors of a site to the coordinator.

    Args:
        topology: of this rank, in the federation
        compression: of the vectors
    """
    if compression.is_identity is True:
        return Upload(topology)
    assert compression.matrix_rank is None  # P and Q would take two meetings
    return CompressedUpload(topology, compression)


def make_transport(
    topology: Topology, compression: UpdateCompression, layout: Sequence[tuple[int, torch.Size]]
) -> Transport:
    """Make the transport for this compression.

    Args:
        topology: of this rank
        compression: between the silos
        layout: the start and the shape of each parameter in a vector
    """
    if compression.is_identity is True:  # pyright narrows the union by the literal
        return AllReduce(topology)
    if compression.matrix_rank is not None:
        return PowerSGDAllReduce(topology, compression.matrix_rank, layout)
    return CompressedAllReduce(topology, compression)
