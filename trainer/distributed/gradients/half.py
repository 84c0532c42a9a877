"""Gradients in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.topology import Topology
from trainer.optim import LossScaler

HOOKS = {"bfloat16": bf16_compress_hook, "float16": fp16_compress_hook}


class HalfPrecisionReducer:
    """Half the bytes: each replica rounds its gradients to 16 bits, divides by R, and the all-reduce sums in 16 bits.

    For R replicas that is at most R + 1 roundings, each of the relative error u: 2^-8 in bfloat16, 2^-11 in float16,
    so that the mean is off by at most (R + 1) u times the mean of the |gradients|. Nothing is fed back: rounding to the
    nearest has no direction, and errors of single steps are far below the noise of a batch. There is no state.

    float16 has fewer exponents: gradients over 65504 become infinite, on all replicas, for loss scaling to notice;
    below 6e-5 they are rounded to multiples of 6e-8. With `precision=fp16` the loss scale keeps them in range.
    """

    def __init__(self, dtype: Literal["bfloat16", "float16"] = "bfloat16"):
        self.hook = HOOKS[dtype]

    def attach(self, ddp: DistributedDataParallel, topology: Topology, scaler: LossScaler) -> None:
        # Registered by its own name, torch refuses the hook for bfloat16 where there is no NCCL; gloo can do it.
        ddp.register_comm_hook(topology.silo_group, lambda group, bucket: self.hook(group, bucket))

    def encoded_size(self, gradients: Sequence[Tensor]) -> int:
        return 2 * sum(gradient.numel() for gradient in gradients)

    def rollback(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def reshard(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {}
