"""Gradients in 8 bits, with error feedback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed import collectives
from trainer.distributed.compression.blocks import validate_block_size
from trainer.distributed.compression.int8 import SCALE_BYTES, dequantize, quantize
from trainer.distributed.gradients.error_feedback import ErrorFeedback, average_states
from trainer.distributed.topology import Topology
from trainer.optim import LossScaler


class Int8Reducer:
    """A quarter of the bytes: int8 numbers with a scale for each block, and error feedback.

    A sum of int8 would wrap around, so quantized gradients are exchanged and summed in float32. Two replicas send each
    other all of theirs, and quantize once. More replicas exchange parts (all-to-all); each sums its part, quantizes it
    again, and sends it to all (all-gather). The bytes are those of a ring all-reduce. All replicas dequantize the same
    bytes to the same bits.

    The quantization error of replica k is its residual e_k, which it adds to its next gradients g_k: mean(g_k + e_k) is
    what was sent plus mean(e_k'), to rounding. The error of the second quantization is one of the mean. The replica
    that made it adds R times as much to its residual, whose weight in the mean is 1 / R. With m the largest |gradient|
    of a block, the sum of all means lacks at most m / 250 between two replicas, and m / 120 between more, after any
    number of steps.

    Args:
        block: the gradients that share a scale, a multiple of 8

    Raises:
        ValueError: the block is not a multiple of 8
    """

    takes_sparse = False
    takes_parts = False
    reduce_dtype: torch.dtype | None = None

    def __init__(self, block: int = 256):
        validate_block_size("gradient_compression", block)
        self.block = block

    def attach(self, ddp: DistributedDataParallel, topology: Topology, scaler: LossScaler) -> None:
        self.topology = topology
        self.error_feedback = ErrorFeedback(ddp.module, scaler, self.block * topology.num_replicas)
        self.started: list[tuple[collectives.Task, collectives.PendingCollective]] = []
        self.futures: list[torch.futures.Future[Tensor]] = []
        ddp.register_comm_hook(None, lambda _, bucket: self._average(bucket))

    def encoded_size(self, gradients: Sequence[Tensor]) -> int:
        numbers = sum(gradient.numel() for gradient in gradients)
        return numbers + SCALE_BYTES * math.ceil(numbers / self.block)

    def rollback(self) -> None:
        self.error_feedback.rollback()

    def state_dict(self) -> dict[str, Any]:
        return self.error_feedback.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.error_feedback.load_state_dict(state)

    def reshard(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return average_states(states)

    def _average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start to send a bucket, while the backward pass computes the next. The last one finishes all of a step."""
        gradients = bucket.buffer()
        future = torch.futures.Future(devices=[gradients.device] if gradients.is_cuda else [])
        task = self._average_bucket(bucket)
        self.started.append((task, next(task)))
        self.futures.append(future)
        if bucket.is_last():
            means = list(collectives.finish_tasks(self.started, 1 if self.topology.num_replicas == 2 else 2))
            for waiting, mean in zip(self.futures, means, strict=True):
                waiting.set_result(mean)
            self.started, self.futures = [], []
        return future

    def _average_bucket(self, bucket: GradBucket) -> collectives.Task:
        """Average the gradients of a bucket in DDP's buffer, and yield that."""
        residual, gradients = self.error_feedback.compensate(bucket), bucket.buffer()
        replicas, replica, group = self.topology.num_replicas, self.topology.replica, self.topology.silo_group
        packed = quantize(residual, self.block)
        residual[: len(gradients)].sub_(dequantize(packed, gradients))
        if replicas == 2:
            received = yield collectives.all_gather_async(packed, group)
            gradients.add_(dequantize(received[1 - replica], torch.empty_like(gradients))).mul_(0.5)
        else:
            received = yield collectives.all_to_all_async(packed, group)
            mean = dequantize(received, torch.empty_like(residual)).view(replicas, -1).mean(0)
            packed = quantize(mean, self.block)
            # The quantization error of the mean of this replica's part.
            mean.sub_(dequantize(packed, torch.empty_like(mean)))
            residual.view(replicas, -1)[replica].add_(mean, alpha=replicas)
            received = yield collectives.all_gather_async(packed, group)
            dequantize(received.flatten(0, 1), gradients)
        yield gradients
