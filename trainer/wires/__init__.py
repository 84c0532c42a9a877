"""How numbers travel between silos. One file each; uplink.py chooses."""

from trainer.wires.lowrank import LowRank
from trainer.wires.packed import Packed
from trainer.wires.uplink import wire_of
from trainer.wires.wire import Plain, Wire

__all__ = ["LowRank", "Packed", "Plain", "Wire", "wire_of"]
