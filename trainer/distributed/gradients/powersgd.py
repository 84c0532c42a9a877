"""Gradients as products of thin matrices, with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.topology import Topology
from trainer.optim import LossScaler
from trainer.utils.errors import raise_errors

MIN_COMPRESSION_RATE = 2  # below which a matrix is sent as it is
EPSILON = 1e-8  # added to the norm of a column, so that a matrix of zeros is not divided by zero


class PowerSGDReducer:
    """(n + m) * rank numbers of an n x m gradient: P Q' by one step of power iteration, with error feedback.

    Vogels, Karimireddy and Jaggi 2019 (arXiv 1905.13727), by torch's own hook. P = orthonormal(mean(M_k) Q), then
    Q = mean(M_k)' P, where M_k is the gradient of replica k plus its residual. Q is kept for the next step, and
    replica k keeps the residual M_k - P Q'. Vectors, and matrices of which it would send more than half, are sent as
    they are.

    The first `start` steps of a client are not compressed, because compression harms early steps most. At least two
    are not, because DDP rebuilds its buckets after the first.

    Args:
        rank: the columns of the thin matrices, from 1
        start: the first steps of each client, which are not compressed, from 2

    Raises:
        ValueError: `rank` or `start` is too small
    """

    takes_sparse = False
    takes_parts = False
    reduce_dtype: torch.dtype | None = None

    def __init__(self, rank: int = 4, start: int = 10):
        errors = [f"gradient_compression.rank={rank}\n  valid: a whole number from 1"] if rank < 1 else []
        errors += [f"gradient_compression.start={start}\n  valid: a whole number from 2"] if start < 2 else []
        raise_errors(errors)
        self.rank, self.start = rank, start

    def attach(self, ddp: DistributedDataParallel, topology: Topology, scaler: LossScaler) -> None:
        self.scaler, self.device = scaler, topology.device
        self.group = topology.silo_group if topology.device.type == "cuda" else SerializedGroup(topology.silo_group)
        self.load_state_dict({})
        ddp.register_comm_hook(None, lambda _, bucket: self._average(bucket))

    def encoded_size(self, gradients: Sequence[Tensor]) -> int:
        # The size after the first steps, by the rule of the hook.
        return sum(gradient.element_size() * self._compressed_numel(gradient) for gradient in gradients)

    def rollback(self) -> None:
        self.hook.error_dict, self.hook.p_memory_dict, self.hook.q_memory_dict = self.previous

    def state_dict(self) -> dict[str, Any]:
        generator = self.hook.rng.get_state(legacy=False)["state"]
        return {
            "iteration": self.hook.iter,
            "errors": _keyed_by_name(self.hook.error_dict),
            "p": _keyed_by_name(self.hook.p_memory_dict),
            "q": _keyed_by_name(self.hook.q_memory_dict),
            "generator": torch.tensor([*generator["key"].tolist(), generator["pos"]]),
            "loss_scale": self.loss_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        options: dict[str, Any] = {"orthogonalization_epsilon": EPSILON, "min_compression_rate": MIN_COMPRESSION_RATE}
        hook = PowerSGDState(self.group, self.rank, self.start, **options)
        self.hook, self.loss_scale = hook, state.get("loss_scale", self.scaler.loss_scale)
        if state:
            hook.iter = state["iteration"]
            hook.error_dict, p, q = (_keyed_by_bucket(state[name], self.device) for name in ("errors", "p", "q"))
            hook.p_memory_dict, hook.q_memory_dict = _clone_tensors(p), _clone_tensors(q)  # the hook writes to them
            *key, position = state["generator"].tolist()
            hook.rng.set_state(hook.rng.get_state(legacy=False) | {"state": {"key": key, "pos": position}})
        self._snapshot()

    def reshard(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        # The mean over the replicas lacks the mean of their errors. All else is equal on all replicas.
        errors = {
            bucket: torch.stack([state["errors"][bucket] for state in states]).mean(0) for bucket in states[0]["errors"]
        }
        return states[0] | {"errors": errors}

    def _compressed_numel(self, gradient: Tensor) -> int:
        rows = gradient.shape[0]
        columns = gradient.numel() // rows
        thin = min(rows, columns, self.rank) * (rows + columns)
        return thin if MIN_COMPRESSION_RATE * thin < gradient.numel() else gradient.numel()

    def _average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if bucket.index() == 0:
            self._begin_step()
        return powerSGD_hook(self.hook, bucket)

    def _begin_step(self) -> None:
        factor = self.scaler.loss_scale / self.loss_scale
        if factor != 1:  # a power of two: nothing is rounded
            self.hook.error_dict = {index: error * factor for index, error in self.hook.error_dict.items()}
            self.loss_scale = self.scaler.loss_scale
        if self.scaler.may_skip:
            self._snapshot()

    def _snapshot(self) -> None:
        """Keep the state before a step."""
        # The hook makes new tensors for the errors and P, but writes to Q in place.
        hook = self.hook
        self.previous = (dict(hook.error_dict), dict(hook.p_memory_dict), _clone_tensors(hook.q_memory_dict))


class SerializedGroup:
    """A gloo group for the hook, of which each collective ends before the next starts.

    The hook starts its later collectives in callbacks, which gloo runs in its two threads. With two buckets under way
    both threads could wait for ever, replicas could start collectives in different orders, and a callback that holds
    the last reference to the group would destroy its threads from within. A future that has completed runs its
    callback at once, in the calling thread.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        assert group is not None
        self.group = group

    def size(self) -> int:
        return self.group.size()

    def allreduce(self, tensors: list[Tensor], options: dist.AllreduceOptions) -> CompletedWork:
        return CompletedWork(self.group.allreduce(tensors, options))


@dataclass(frozen=True)
class CompletedWork:
    """A collective that has completed when its future is requested."""

    work: dist.Work

    def get_future(self) -> torch.futures.Future[Any]:
        self.work.wait()
        return self.work.get_future()


def _clone_tensors(tensors: dict[int, Tensor]) -> dict[int, Tensor]:
    return {index: tensor.clone() for index, tensor in tensors.items()}


def _keyed_by_name(by_bucket: dict[int, Tensor]) -> dict[str, Tensor]:
    return {str(index): tensor for index, tensor in by_bucket.items()}


def _keyed_by_bucket(by_name: dict[str, Tensor], device: torch.device) -> dict[int, Tensor]:
    return {int(name): tensor.to(device) for name, tensor in by_name.items()}
