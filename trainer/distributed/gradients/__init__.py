"""Reducers, which average the gradients of a silo's replicas, compressed or not. One file each.

All are communication hooks of DistributedDataParallel.
"""

from trainer.distributed.gradients.base import FullPrecisionReducer as FullPrecisionReducer
from trainer.distributed.gradients.base import GradientReducer as GradientReducer
from trainer.distributed.gradients.ddp import wrap_ddp as wrap_ddp
from trainer.distributed.gradients.half import HalfPrecisionReducer as HalfPrecisionReducer
from trainer.distributed.gradients.int8 import Int8Reducer as Int8Reducer
from trainer.distributed.gradients.powersgd import PowerSGDReducer as PowerSGDReducer
