"""Transports, which combine vectors of the silos. One file each; `make_transport` and `make_upload` choose."""

from trainer.distributed.transport.base import AllReduce, Transport
from trainer.distributed.transport.compressed import CompressedAllReduce
from trainer.distributed.transport.factory import make_transport, make_upload
from trainer.distributed.transport.low_rank import PowerSGDAllReduce
from trainer.distributed.transport.upload import decode_upload, upload_like

__all__ = [
    "AllReduce",
    "CompressedAllReduce",
    "PowerSGDAllReduce",
    "Transport",
    "decode_upload",
    "make_transport",
    "make_upload",
    "upload_like",
]
