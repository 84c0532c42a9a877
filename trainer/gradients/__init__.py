"""How the replicas of a silo average their gradients: as they are, or compressed. One file each.

All are communication hooks of DistributedDataParallel. What compresses with a loss keeps what it has not sent.
"""

from trainer.gradients.gradients import FullPrecision as FullPrecision
from trainer.gradients.gradients import Gradients as Gradients
from trainer.gradients.half import HalfPrecision as HalfPrecision
from trainer.gradients.int8 import Int8 as Int8
from trainer.gradients.powersgd import PowerSGD as PowerSGD
from trainer.gradients.wrapping import wrap as wrap
