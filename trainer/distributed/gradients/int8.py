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
from trainer.distributed.gradients.blocks import SCALE_BYTES, dequantize, quantize
from trainer.distributed.gradients.error_feedback import ErrorFeedback, average_states
from trainer.distributed.topology import Topology
from trainer.optim import LossScaler


@dataclass
class InFlightBucket:
    """A bucket on its way: what becomes its mean, what is owed of it, the bytes that come in, and what waits for it."""

    gradients: Tensor
    residual: Tensor
    received: Tensor
    work: dist.Work
    future: torch.futures.Future[Tensor]


class Int8Reducer:
    """A quarter of the bytes: int8 numbers with a scale for each `block` of them, and error feedback.

    A sum of int8 wraps around, so packed numbers are exchanged and summed in float32. Two replicas send each other all
    of theirs: each loses once. More of them send each its part (all-to-all), which it sums, packs again, and sends to
    all (all-gather): the bytes of a ring all-reduce, and a second loss. All unpack the same bytes to the same bits.

    What replica k lost is its residual e_k, which it adds to its next gradients g_k: mean(g_k + e_k) is what was sent
    plus mean(e_k'), to rounding. What the second packing loses of the mean is R times as much to the replica that does
    it, whose share in the mean is 1 / R. With m the largest |gradient| of a block, what is missing of the mean stays
    below m / 250 between two replicas, and below m / 120 between more, however many steps are made.

    Raises ValueError when the block is not a multiple of 8.
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
        """Begins to send a bucket, while the backward pass goes on to the next.

        All are ended with the last one, in their order: in callbacks, gloo would call the second collective of one
        bucket before or after the first of another as chance has it, on each replica in its own way.
        """
        owed, gradients = self.error_feedback.compensate(bucket), bucket.buffer()
        packed = quantize(owed, self.block)
        owed[: len(gradients)].sub_(dequantize(packed, gradients))
        received, work = self._all_to_all_async(packed)
        future = torch.futures.Future(devices=[gradients.device] if gradients.is_cuda else [])
        self.in_flight.append(InFlightBucket(gradients, owed, received, work, future))
        if bucket.is_last():
            self._finish_bucket()
        return future

    def _finish_bucket(self) -> None:
        sendings, self.in_flight = self.in_flight, []
        if self.topology.num_replicas == 2:
            for sending in sendings:
                self._average_with_peer(sending)
        else:
            gathers = [self._all_gather_mean_async(sending) for sending in sendings]
            for sending, (received, work) in zip(sendings, gathers, strict=True):
                work.wait()
                dequantize(received, sending.gradients)
        for sending in sendings:
            sending.future.set_result(sending.gradients)

    def _all_to_all_async(self, packed: Tensor) -> tuple[Tensor, dist.Work]:
        """Two replicas: the bytes of both. More: the bytes that all have for the part that this one sums."""
        if self.topology.num_replicas == 2:
            return self._all_gather_async(packed)
        received = torch.empty_like(packed)
        work = dist.all_to_all_single(received, packed, group=self.topology.silo_group, async_op=True)
        assert work is not None
        return received, work

    def _average_with_peer(self, bucket: InFlightBucket) -> None:
        """Makes the mean of what this replica has sent, which the gradients are now, and what the other one has."""
        bucket.work.wait()
        other = bucket.received.chunk(2)[1 - self.topology.replica]
        bucket.gradients.add_(dequantize(other, torch.empty_like(bucket.gradients))).mul_(0.5)

    def _all_gather_mean_async(self, bucket: InFlightBucket) -> tuple[Tensor, dist.Work]:
        """Begins to send the mean of this replica's part to all; what is lost of it, the replica owes."""
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
