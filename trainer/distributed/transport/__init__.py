"""How numbers travel between silos. One file each; uplink.py chooses."""

from trainer.distributed.transport.base import Plain, Wire
from trainer.distributed.transport.compressed import Packed
from trainer.distributed.transport.factory import wire_of
from trainer.distributed.transport.low_rank import LowRank

__all__ = ["LowRank", "Packed", "Plain", "Wire", "wire_of"]
