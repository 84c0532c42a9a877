"""Gradients in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.gradients.base import StatelessReducer
from trainer.distributed.topology import Topology
from trainer.optim import LossScaler

HOOKS = {"bfloat16": bf16_compress_hook, "float16": fp16_compress_hook}


class HalfPrecisionReducer(StatelessReducer):
    """Half the bytes: each replica casts its gradients to 16 bits and divides by R, and the sum is made in 16 bits.

    For R replicas that is at most R + 1 roundings, each of the relative error u: 2^-8 in bfloat16, 2^-11 in float16.
    The mean is off by at most (R + 1) u times the mean of the |gradients|. There is no error feedback: rounding to the
    nearest is unbiased, and the errors of single steps are far below the noise of a batch.

    float16 has fewer exponents. Gradients above 65504 become infinite on all replicas, which loss scaling notices.
    Gradients below 6e-5 are rounded to multiples of 6e-8. With `precision=fp16` the loss scale keeps them in range.

    Args:
        dtype: bfloat16 or float16
    """

    def __init__(self, dtype: Literal["bfloat16", "float16"] = "bfloat16"):
        self.hook, self.reduce_dtype = HOOKS[dtype], getattr(torch, dtype)

    def attach(self, ddp: DistributedDataParallel, topology: Topology, scaler: LossScaler) -> None:
        # torch refuses the bfloat16 hook itself without NCCL, although gloo supports it.
        ddp.register_comm_hook(topology.silo_group, lambda group, bucket: self.hook(group, bucket))

    def encoded_size(self, gradients: Sequence[Tensor]) -> int:
        return 2 * sum(gradient.numel() for gradient in gradients)
