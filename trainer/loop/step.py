"""The training step of a silo: forward, backward, clipping and the optimizer, by all its replicas in lockstep."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.algorithms.base import ClientSession
from trainer.algorithms.client_result import ClientResult
from trainer.data.loading.loader import MicroBatch, ReplicaBatch
from trainer.distributed import collectives
from trainer.distributed.gradients.ddp import raise_if_unused
from trainer.distributed.sharding import ParallelModel
from trainer.loop.loss_normalizer import LossNormalizer
from trainer.loop.run import Run
from trainer.models.calling import call_model
from trainer.models.flat import FlatModel
from trainer.optim import DynamicLossScaler, IdentityLossScaler, LossScaler
from trainer.optim.ema import ExponentialMovingAverage
from trainer.optim.schedules import Scheduler
from trainer.optim.state import OptimizerState
from trainer.utils.compile import compile_module
from trainer.utils.oom import raise_if_oom
from trainer.utils.seeding import default_generators
from trainer.utils.tensor_trees import Tree, num_examples, take


class TrainStep:
    """Makes the steps of one client after the other, with one optimizer whose state is swapped between them.

    Attributes:
        parallel: the model as the ranks of the silo hold it.
        optimizer: the clients' optimizer.
        scheduler: sets its learning rates by the progress of the run.
        scaler: scales the loss for float16.
        gradient_reducer: averages gradients over the silo; may hold back what compression lost.
        forward: the bare model in the run's precision, for evaluation.
        ema: an average of the weights that takes in every step; None if there is none, or it is updated by round.
        generators: PyTorch's default random generators, seeded anew for every micro-batch.
    """

    def __init__(self, run: Run, model: FlatModel, parallel: ParallelModel, ema: ExponentialMovingAverage | None):
        self.run, self.model, self.parallel, self.ema = run, model, parallel, ema
        device = run.topology.device
        self.scaler: LossScaler = DynamicLossScaler(device) if run.autocast == torch.float16 else IdentityLossScaler()
        reducer, allow_unused = run.gradient_compression(), run.training.allow_unused
        wrapped, self.gradient_reducer = parallel.wrap(reducer, self.scaler, allow_unused)
        self.training_model = compile_module(wrapped, run.training.compile_backend)
        self.forward = partial(call_model, compile_module(model.module, run.training.compile_backend))
        self.loss_sum = self._loss_sum
        if run.autocast:
            autocast = torch.autocast(device.type, run.autocast)
            self.loss_sum, self.forward = autocast(self.loss_sum), autocast(self.forward)
        self.optimizer = run.optimizer(model.named_trainable)
        self.optimizer_state = OptimizerState(self.optimizer)
        self.scheduler = Scheduler(self.optimizer, run.schedule)
        self.generators = default_generators(device)
        self.loss_normalizer = LossNormalizer(run.topology, torch.promote_types(model.shared.dtype, torch.float32))
        self.has_batch_statistics = model.has_batch_statistics
        # What several parts have in common is counted in the norm by one of them.
        left_out = model.repeated_names if run.topology.tensor_rank else set()
        self._counted = [parameter for name, parameter in model.named_trainable if name not in left_out]
        # With counts of units the weight of a batch is their sum.
        self.units = run.task.units if run.unit_counts is None else _one_unit

    def __call__(
        self, batch: ReplicaBatch, seed: int, session: ClientSession, result: ClientResult, measure_norm: bool
    ) -> None:
        """Make a step on this replica's part of a batch, and count it in the result.

        Args:
            batch: the micro-batches of this replica.
            seed: seeds the random operations of the model; other micro-batches than the last use the seeds after it.
            session: adjusts the gradients.
            result: what the client has done so far.
            measure_norm: whether the norm of the gradient is wanted, even if it is not clipped.
        """
        loss_sum, units = self._accumulate_gradients(batch, seed)
        self.parallel.take_gradients()
        self.scaler.unscale(self.optimizer)
        session.adjust_gradients()
        clipped = (self.model.trainable, measure_norm, self._norm_over_parts, self._counted)
        result.gradient_norm = self.run.clipper(*clipped)
        if self.scaler.step(self.optimizer):
            result.lr_factors.append(self.scheduler.factor)
            if self.ema:
                self.ema.update()
        else:
            self.gradient_reducer.rollback()
        self.model.clear_gradients()
        result.add(batch.examples, loss_sum, units)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first group of parameters."""
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """Return the live state of the optimizer and of the loss scaler."""
        state = {"optimizer": self.optimizer_state.state_dict(), "scaler": self.scaler.state_dict()}
        return state | {"lr_factor": self.scheduler.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; what is missing is reset."""
        self.optimizer_state.load_state_dict(state.get("optimizer", {}))
        # An optimizer may change its own rates: they are those of its state, until the schedule sets others.
        self.scheduler.factor = state.get("lr_factor", 1.0)
        self.scaler.load_state_dict(state.get("scaler", {}))

    def warm_up(self, inputs: Tree, targets: Tree) -> None:
        """Bring DDP to where it is after a step: after its first backward it reorders its buckets, which changes bits.

        A restored run does this before its first step, a new one must not. The loss is multiplied by zero and the
        gradients are dropped.
        """
        self.model.module.train()
        (self.loss_sum(inputs, targets) * 0).backward()
        self.parallel.take_gradients()
        self.model.clear_gradients()
        self.gradient_reducer.load_state_dict({})

    def try_forward_backward(self, inputs: Tree, targets: Tree) -> None:
        """Run forward and backward of these examples without communication. Leaves gradients behind."""
        self.model.module.train()
        with self.parallel.alone():
            self._forward_backward((inputs, targets), self.loss_normalizer[num_examples(inputs)], 0)

    def _accumulate_gradients(self, batch: ReplicaBatch, seed: int) -> tuple[Tensor, float]:
        """Add the gradient of the mean loss over the silo's batch; return this replica's loss sum and units."""
        *earlier, last = batch.micro_batches
        units = self.units(last[1])
        counted = batch.replica_weight * units
        # A replica whose examples weigh nothing takes part in the collective, and adds nothing.
        scale = self.scaler.scale(self.loss_normalizer[batch.weight * units if counted else math.inf])
        losses = [self._forward_backward_no_sync(examples, scale, seed + 1 + i) for i, examples in enumerate(earlier)]
        # Only the last micro-batch is a collective.
        loss_sum = self._forward_backward(last, scale, seed)
        for _ in range(batch.fillers):
            self._forward_backward(_first_example(last), self.loss_normalizer[math.inf], seed)
        loss_sum = sum(losses, start=loss_sum) if losses else loss_sum
        if not self.run.topology.counts_examples:
            counted = 0.0
        return loss_sum if counted else torch.zeros_like(loss_sum), counted

    def _forward_backward_no_sync(self, examples: MicroBatch, scale: Tensor, seed: int) -> Tensor:
        with self.parallel.no_sync():
            return self._forward_backward(examples, scale, seed)

    def _forward_backward(self, examples: MicroBatch, scale: Tensor, seed: int) -> Tensor:
        for generator in self.generators:
            generator.manual_seed(seed)
        count = num_examples(examples[0])
        if self.has_batch_statistics and self.model.module.training != (count > 1):
            self.model.module.train(count > 1)  # a single example has no statistics of its own
        try:
            loss_sum = self.loss_sum(*examples)
            loss_sum.backward(scale)
        except (RuntimeError, MemoryError) as error:
            raise_if_oom(error, "micro_batch_size", self.run.training.micro_batch_size, count)
            raise_if_unused(error, self.model.module)
            raise
        return loss_sum.detach_()

    def _norm_over_parts(self, norm: Tensor, order: float) -> Tensor:
        return collectives.norm_over_parts(norm, order, self.run.topology)

    def _loss_sum(self, inputs: Tree, targets: Tree, *weights: Tensor) -> Tensor:
        return self.run.task.loss_sum(call_model(self.training_model, inputs), targets, *weights)


def _first_example(columns: MicroBatch) -> MicroBatch:
    return tuple(take(column, slice(1)) for column in columns)


def _one_unit(targets: Tree) -> int:
    return 1
