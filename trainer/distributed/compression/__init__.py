"""Codecs, which compress updates between the silos. One file each."""

from trainer.distributed.compression.base import Codec, PowerSGD, Uncompressed, UpdateCompression
from trainer.distributed.compression.cast import Cast
from trainer.distributed.compression.int4 import Int4
from trainer.distributed.compression.int8 import Int8
from trainer.distributed.compression.topk import TopK

__all__ = ["Cast", "Codec", "Int4", "Int8", "PowerSGD", "TopK", "Uncompressed", "UpdateCompression"]
