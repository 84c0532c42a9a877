"""Gradients in 8 bits, with error feedback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed import collectives
from trainer.distributed.compression.blocks import validate_block_size
from trainer.distributed.compression.int8 import SCALE_BYTES, dequantize, quantize
from trainer.distributed.gradients.error_feedback import ErrorFeedback, average_states
from trainer.distributed.topology import Topology
from trainer.optim import LossScaler


@dataclass
class InFlightBucket:
    """A bucket under way.

    gradients  DDP's buffer: the gradients as sent, and at last their mean
    residual   the part of the gradients that was not sent
    received   the bytes from the other replicas
    work       of the collective that fills `received`
    future     for DDP, which waits for the mean
    """

    gradients: Tensor
    residual: Tensor
    received: Tensor
    work: dist.Work
    future: torch.futures.Future[Tensor]


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

    def __init__(self, block: int = 256):
        validate_block_size("gradient_compression", block)
        self.block = block

    def attach(self, ddp: DistributedDataParallel, topology: Topology, scaler: LossScaler) -> None:
        self.topology = topology
        self.error_feedback = ErrorFeedback(ddp.module, scaler, self.block * topology.num_replicas)
        self.in_flight: list[InFlightBucket] = []
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
        """Start to send a bucket, while the backward pass computes the next."""
        residual, gradients = self.error_feedback.compensate(bucket), bucket.buffer()
        packed = quantize(residual, self.block)
        residual[: len(gradients)].sub_(dequantize(packed, gradients))
        received, work = self._all_to_all_async(packed)
        future = torch.futures.Future(devices=[gradients.device] if gradients.is_cuda else [])
        self.in_flight.append(InFlightBucket(gradients, residual, received, work, future))
        if bucket.is_last():
            self._finish_buckets()
        return future

    def _finish_buckets(self) -> None:
        """Finish all buckets of a step, in their order.

        Not in callbacks: gloo would run them in any order, so that replicas would call the second collective of one
        bucket and the first of another in different orders.
        """
        buckets, self.in_flight = self.in_flight, []
        if self.topology.num_replicas == 2:
            for bucket in buckets:
                self._average_with_peer(bucket)
        else:
            gathers = [self._all_gather_mean_async(bucket) for bucket in buckets]
            for bucket, (received, work) in zip(buckets, gathers, strict=True):
                work.wait()
                dequantize(received, bucket.gradients)
        for bucket in buckets:
            bucket.future.set_result(bucket.gradients)

    def _all_to_all_async(self, packed: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to exchange bytes: all of them between two replicas, else those of the part that each replica sums."""
        if self.topology.num_replicas == 2:
            return self._all_gather_async(packed)
        received = torch.empty_like(packed)
        work = dist.all_to_all_single(received, packed, group=self.topology.silo_group, async_op=True)
        assert work is not None
        return received, work

    def _average_with_peer(self, bucket: InFlightBucket) -> None:
        """Average the gradients as this replica has sent them with those of the other replica, in place."""
        bucket.work.wait()
        other = bucket.received.chunk(2)[1 - self.topology.replica]
        bucket.gradients.add_(dequantize(other, torch.empty_like(bucket.gradients))).mul_(0.5)

    def _all_gather_mean_async(self, bucket: InFlightBucket) -> tuple[Tensor, dist.Work]:
        """Start to send the mean of this replica's part to all, and add its quantization error to the residual."""
        replicas, replica = self.topology.num_replicas, self.topology.replica
        bucket.work.wait()
        mean = dequantize(bucket.received, torch.empty_like(bucket.residual)).view(replicas, -1).mean(0)
        packed = quantize(mean, self.block)
        mean.sub_(dequantize(packed, torch.empty_like(mean)))
        bucket.residual.view(replicas, -1)[replica].add_(mean, alpha=replicas)
        return self._all_gather_async(packed)

    def _all_gather_async(self, packed: Tensor) -> tuple[Tensor, dist.Work]:
        received = packed.new_empty(self.topology.num_replicas * len(packed), packed.shape[1])
        work = collectives.all_gather(received, packed, group=self.topology.silo_group, async_op=True)
        assert work is not None
        return received, work
