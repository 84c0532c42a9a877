"""Codecs: how numbers become fewer bytes, and come back. One file each."""

from trainer.codecs.cast import Cast
from trainer.codecs.codec import Codec, Full, PowerSGD, Uplink
from trainer.codecs.int4 import Int4
from trainer.codecs.int8 import Int8
from trainer.codecs.topk import TopK

__all__ = ["Cast", "Codec", "Full", "Int4", "Int8", "PowerSGD", "TopK", "Uplink"]
