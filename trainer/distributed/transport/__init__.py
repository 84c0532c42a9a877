"""Transports, which combine vectors of the silos. One file each; `make_transport` chooses."""

from trainer.distributed.transport.base import AllReduce, Transport
from trainer.distributed.transport.compressed import CompressedAllReduce
from trainer.distributed.transport.factory import make_transport
from trainer.distributed.transport.low_rank import PowerSGDAllReduce

__all__ = ["AllReduce", "CompressedAllReduce", "PowerSGDAllReduce", "Transport", "make_transport"]
