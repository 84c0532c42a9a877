"""The step: one client's local work in a round, by every replica of its silo in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import signature
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from trainer import comm
from trainer.cohort import Round
from trainer.data.loader import Batch, Share, Stream
from trainer.flat import FlatModel
from trainer.optimizers import clone_state, optimizer_state, restore_optimizer_state
from trainer.randomness import default_generators
from trainer.run import Run
from trainer.topology import Topology

# What torch 2.13 calls the option that was broadcast_buffers before.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)

LOSSES_KEPT = 1024  # appending a step's loss to a list costs a tenth of adding it to a tensor


@dataclass
class Work:
    """What a client did in a round. losses and units are this replica's part, the rest is equal in the silo.

    examples        n_k, the size of the client's training set
    examples_seen   examples that went through the model, epochs counted
    units           what the loss is summed over: examples or tokens
    gradient_norm   of the last step, before clipping
    """

    client: int
    examples: int
    losses: list[Tensor] = field(default_factory=list)
    folded: Tensor | float = 0.0
    last: tuple[Tensor | float, int] = (0.0, 0)
    examples_seen: int = 0
    steps: int = 0
    units: int = 0
    gradient_norm: Tensor | float = 0.0
    learning_rate: float = 0.0
    seconds_data: float = 0.0
    seconds_compute: float = 0.0

    def add(self, batch: Batch, loss_sum: Tensor, units: int) -> None:
        """Counts one step."""
        self.last = (loss_sum, units)
        self.steps += 1
        self.examples_seen += batch.examples
        self.units += units
        self.losses.append(loss_sum)
        if len(self.losses) == LOSSES_KEPT:
            self._fold()

    def last_loss(self) -> float:
        """This replica's mean loss of the last step. Waits for the device."""
        loss_sum, units = self.last
        return float(loss_sum) / max(units, 1)

    @property
    def loss_sum(self) -> float:
        """The sum of the steps' losses over their units. Waits for the device."""
        if self.losses:
            self._fold()
        return float(self.folded)

    def _fold(self) -> None:
        self.folded = self.folded + torch.stack(self.losses).double().sum()
        self.losses = []


# Told after each step: the part done of the client's round, the examples of the step, and its mean loss when asked.
Watch = Callable[[float, int, Callable[[], float]], None]


class Shares(dict[int, Tensor]):
    """What a loss sum is multiplied by, by the units of the whole batch, as the gradient that backward starts from.

    DDP averages over the replicas; so each brings its sum, times their number, over the units of the silo's batch.
    """

    def __init__(self, topology: Topology, dtype: torch.dtype):
        super().__init__()
        self.topology, self.dtype = topology, dtype

    def __missing__(self, units: int) -> Tensor:
        self[units] = torch.tensor(self.topology.num_replicas / units, dtype=self.dtype, device=self.topology.device)
        return self[units]


class LocalTrainer:
    """Trains one client after the other on one model and one optimizer, and keeps what is a client's own in between.

    states      what clients keep between their rounds, by client: optimizer state and personal tensors
    has_stepped whether this replica has trained since the run began
    statistics  the global BatchNorm statistics and counters, from which every client starts its round
    outputs     the bare model, in the precision of the run, for evaluation
    """

    def __init__(self, run: Run, model: FlatModel):
        self.run, self.task, self.model = run, run.task, model
        self.has_batch_statistics = model.has_batch_statistics
        self.wrapped = _wrap(model.module, run.topology)
        self.no_sync = self.wrapped.no_sync if isinstance(self.wrapped, DistributedDataParallel) else nullcontext
        self.loss_sum, self.outputs = self._loss_sum, model.module.__call__
        if run.autocast:
            autocast = torch.autocast(run.topology.device.type, run.autocast)
            self.loss_sum, self.outputs = autocast(self.loss_sum), autocast(self.outputs)
        self.optimizer = run.optimizer(model.trainable)
        self.rates, self.factor = [group["lr"] for group in self.optimizer.param_groups], 1.0
        self.generators = default_generators(run.topology.device)
        self.shares = Shares(run.topology, torch.promote_types(model.shared.dtype, torch.float32))
        self.states: dict[int, dict[str, Any]] = {}
        self.fresh = model.personal_state()
        self.has_stepped = False
        self.statistics = (model.statistics.vector(), model.statistics.counts())

    def train(self, client: int, round: Round, earlier_rounds: int, watch: Watch | None) -> Work:
        """The Work of one client in this round, after it took part in so many earlier ones."""
        stream = self._stream(client)
        steps = self.run.length.of(stream.steps_per_epoch)
        work = Work(client, len(stream.ids))
        self._begin(client)
        began = perf_counter()
        self.has_stepped = True
        self._steps(work, stream.batches(earlier_rounds * steps, steps), steps, round, watch)
        work.seconds_data = stream.seconds
        work.seconds_compute = perf_counter() - began - stream.seconds
        return work

    def commit(self, client: int) -> None:
        """Makes the state in which the client ended its round the one that it begins its next round with."""
        if not self.run.algorithm.stateful:
            return
        if self.model.personal_buffers:
            own = self.model.personal_statistics
            own.load(comm.mean_in_silo(own.vector(), self.run.topology), own.counts())
        self.states[client] = {"personal": self.model.personal_state()}
        if self.run.algorithm.inner_state == "keep":
            self.states[client]["optimizer"] = optimizer_state(self.optimizer)

    def load_personal(self, client: int) -> None:
        """Puts the client's personal tensors into the model; a client that never trained has the initial ones."""
        self.model.load_personal_state(self.states.get(client, {}).get("personal", self.fresh))

    def pool_statistics(self, vector: Tensor, counts: Tensor) -> None:
        """Gives the model, and all clients of the next round, the pooled statistics. A collective."""
        if not self.model.statistics.any:
            return
        if len(counts):
            comm.maximum(counts)
        self.statistics = (vector, counts)
        self.model.statistics.load(vector, counts)

    def restore_statistics(self) -> None:
        """Gives the model the statistics that all clients of this round began with."""
        if self.model.statistics.any:
            self.model.statistics.load(*self.statistics)

    def _stream(self, client: int) -> Stream:
        run, topology = self.run, self.run.topology
        least = 2 if self.has_batch_statistics else 0
        share = Share(topology.replica, topology.num_replicas, run.micro_batch_size, least)
        ids = run.training_sets[client]
        return Stream(run.data.train, ids, client, run.batch_size, share, run.seed, topology.device)

    def _begin(self, client: int) -> None:
        self.run.algorithm.begin_client(client)
        self.restore_statistics()
        self.load_personal(client)
        kept = self.states.get(client, {}).get("optimizer", {})
        # A client that is left out of the round must find its state as it was.
        restore_optimizer_state(self.optimizer, clone_state(kept) if self.run.algorithm.votes else kept)
        self.model.module.train()

    def warm_up(self) -> None:
        """Brings DDP to where it is after a step: it orders its buckets anew after the first one, which changes bits.

        A run that was loaded does this before its first step, one that is new must not. Nothing else changes: the loss
        is multiplied by zero, gradients are dropped, statistics put back; clients begin with streams of their own.
        """
        inputs, targets = (t.to(self.run.topology.device) for t in self.run.data.train.fetch(torch.arange(2)))
        self.model.module.train()
        (self.loss_sum(inputs, targets) * 0).backward()
        self.optimizer.zero_grad()
        self.restore_statistics()
        self.has_stepped = True

    def _steps(self, work: Work, batches: Iterator[Batch], steps: int, round: Round, watch: Watch | None) -> None:
        seed = round.seed_for("model", work.client, self.run.topology.replica)
        algorithm, optimizer, rounds = self.run.algorithm, self.optimizer, self.run.rounds
        for step, batch in enumerate(batches):
            self._set_rates((round.index + step / steps) / rounds)
            loss_sum, units = self._backward(batch, seed + (step << 16))
            algorithm.correct()
            work.gradient_norm = self._clip(measure=step + 1 == steps)
            optimizer.step()
            optimizer.zero_grad()
            work.add(batch, loss_sum, units)
            if watch:
                watch((step + 1) / steps, batch.examples, work.last_loss)
        work.learning_rate = self.optimizer.param_groups[0]["lr"]

    def _set_rates(self, progress: float) -> None:
        factor = self.run.schedule(progress)
        if factor != self.factor:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.factor = factor

    def _backward(self, batch: Batch, seed: int) -> tuple[Tensor, int]:
        """Adds the gradient of the mean loss over the silo's batch; this replica's loss sum and units."""
        *earlier, (inputs, targets) = batch.micro_batches
        units = self.task.units(targets)
        share = self.shares[batch.examples * units]
        losses = [self._unsynchronised(*examples, share, seed + 1 + i) for i, examples in enumerate(earlier)]
        # Only the last micro-batch is a collective. Every replica runs one, if need be of no examples.
        loss_sum = self._micro_batch(inputs, targets, share, seed)
        return sum(losses, start=loss_sum) if losses else loss_sum, batch.own * units

    def _unsynchronised(self, inputs: Tensor, targets: Tensor, share: Tensor, seed: int) -> Tensor:
        with self.no_sync():
            return self._micro_batch(inputs, targets, share, seed)

    def _micro_batch(self, inputs: Tensor, targets: Tensor, share: Tensor, seed: int) -> Tensor:
        for generator in self.generators:
            generator.manual_seed(seed)
        if self.has_batch_statistics and self.model.module.training != (len(inputs) > 1):
            self.model.module.train(len(inputs) > 1)  # a single example has no statistics of its own
        loss_sum = self.loss_sum(inputs, targets)
        loss_sum.backward(share)
        return loss_sum.detach_()

    def _loss_sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.task.loss_sum(self.wrapped(inputs), targets)

    def _clip(self, measure: bool) -> Tensor | float:
        """The norm of the step's gradient, where it is limited or asked for: it costs a third of a small step."""
        if self.run.clip_norm is not None:
            return clip_grad_norm_(self.model.trainable, self.run.clip_norm)
        return get_total_norm([p.grad for p in self.model.trainable if p.grad is not None]) if measure else 0.0


def _wrap(module: nn.Module, topology: Topology) -> nn.Module:
    """The module, averaging its gradients over the silo. A silo of one stays bare: DDP costs half of a small step."""
    if topology.num_replicas == 1:
        return module
    # Replicas keep their batch statistics apart; they are pooled once a round.
    options: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
    devices = [topology.device] if topology.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, process_group=topology.silo_group, **options)
