"""How the replicas of a silo average their gradients: as they are, or compressed. One file each.

All are communication hooks of DistributedDataParallel. What compresses with a loss keeps what it has not sent.
"""

from trainer.distributed.gradients.base import FullPrecision as FullPrecision
from trainer.distributed.gradients.base import Gradients as Gradients
from trainer.distributed.gradients.ddp import wrap as wrap
from trainer.distributed.gradients.half import HalfPrecision as HalfPrecision
from trainer.distributed.gradients.int8 import Int8 as Int8
from trainer.distributed.gradients.powersgd import PowerSGD as PowerSGD
