"""The step: one client's local work in a round, by every replica of its silo in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from trainer.algorithms.base import ClientSession, ClientState, RoundSession, RunSession
from trainer.algorithms.client_result import ClientResult
from trainer.algorithms.round import Round
from trainer.data import is_sequential
from trainer.data.loading.loader import BatchShard, ClientBatches, Examples, MicroBatch, ReplicaBatch
from trainer.data.loading.prefetch import DeviceFeeder
from trainer.distributed import collectives
from trainer.distributed.gradients.ddp import no_sync, wrap_ddp
from trainer.loop.control import Action, ActionConsensus, LoopControl
from trainer.loop.loss_normalizer import LossNormalizer
from trainer.loop.run import Run
from trainer.models.flat import FlatModel
from trainer.optim import DynamicLossScaler, IdentityLossScaler, LossScaler
from trainer.optim.ema import ExponentialMovingAverage
from trainer.optim.optimizers import clone_state, optimizer_state, restore_optimizer_state
from trainer.utils.compile import compile_module
from trainer.utils.oom import raise_if_oom
from trainer.utils.seeding import default_generators

# Told after each step: the part done of the client's round, the examples of the step, and its mean loss when asked.
StepCallback = Callable[[float, int, Callable[[], float]], None]

# Told what the silo has agreed on, when that is not to go on: saves; says whether the client is to stop here.
ActionCallback = Callable[["ClientTraining", Action], bool]


@dataclass
class ClientTraining:
    """A client in training: what it has done so far, and the algorithm's session with it."""

    result: ClientResult
    session: ClientSession


class LocalTrainer:
    """Trains one client after the other on one model and one optimizer, and keeps what is a client's own in between.

    consensus        what the replicas agree on after a step
    client_states      what clients keep between their rounds, by client: optimizer state, personal tensors, the algorithm's
    initial_personal_state       the personal tensors of a client that has none yet
    has_stepped whether this replica has trained since the run began
    scaler      of the loss, for float16; its state is a client's own
    gradient_reducer   how they are averaged over the silo; what is not sent yet is a client's own, on each replica
    feeder     the training set, as the device gets it
    skipped_windows     windows [first, last) of the round's steps whose batches are not trained on
    micro_batch_size  the run's, or what was found to fit
    statistics  the global BatchNorm statistics and counters, from which every client starts its round
    ema     of the weights, if there is one and steps move the global ones
    forward     the bare model, in the precision of the run, for evaluation
    """

    def __init__(
        self,
        run: Run,
        model: FlatModel,
        algorithm: RunSession,
        control: LoopControl,
        ema: ExponentialMovingAverage | None = None,
    ):
        self.run, self.task, self.model, self.algorithm, self.ema = run, run.task, model, algorithm, ema
        self.control, self.consensus = control, ActionConsensus(run.topology, control)
        self.has_batch_statistics = model.has_batch_statistics
        self.scaler: LossScaler = (
            DynamicLossScaler(run.topology.device) if run.autocast == torch.float16 else IdentityLossScaler()
        )
        wrapped, self.gradient_reducer = wrap_ddp(model.module, run.topology, run.gradient_compression, self.scaler)
        self.no_sync = partial(no_sync, wrapped)
        self.ddp_model, self.forward = (
            compile_module(wrapped, run.compile_backend),
            compile_module(model.module, run.compile_backend),
        )
        self.loss_sum = self._loss_sum
        if run.autocast:
            autocast = torch.autocast(run.topology.device.type, run.autocast)
            self.loss_sum, self.forward = autocast(self.loss_sum), autocast(self.forward)
        self.optimizer = run.optimizer(model.named_trainable)
        self.base_lrs, self.lr_factor = [group["lr"] for group in self.optimizer.param_groups], 1.0
        self.generators = default_generators(run.topology.device)
        self.feeder = DeviceFeeder(run.data.train, run.topology.device, run.cache_on_gpu)
        self.loss_normalizer = LossNormalizer(run.topology, torch.promote_types(model.shared.dtype, torch.float32))
        self.client_states: dict[int, dict[str, Any]] = {}
        self.initial_personal_state = model.personal_state()
        self.has_stepped = False
        self.micro_batch_size = None if run.micro_batch_size == "auto" else run.micro_batch_size
        self.skipped_windows: list[tuple[int, int]] = []
        self.statistics = (model.statistics.vector(), model.statistics.counts())

    def load_global_model(self) -> None:
        """Puts the global model in place, as if nobody had trained."""
        self.algorithm.reset_model()
        self.restore_statistics()

    def start_client(self, session: RoundSession, client: int, exclusive: bool = False) -> ClientTraining:
        """A client about to begin its round, with the model and the optimizer as it needs them.

        `exclusive`: before the next combination no other client begins, and this one surely comes to it.
        """
        kept, skips = self.client_states.get(client, {}), self.run.algorithm.skips_nonfinite_clients
        started = session.start_client(kept.get("algorithm", {}), exclusive)
        self.restore_statistics()
        self.load_personal(client)
        state = kept.get("optimizer", {})
        # A client that is left out of the round must find its state as it was.
        restore_optimizer_state(self.optimizer, clone_state(state) if skips else state)
        self.scaler.load_state_dict(kept.get("scaler", {}))
        # Without a vote there is no way back, and the memory is wanted.
        self.gradient_reducer.load_state_dict(kept.get("own", {}) if skips else kept.pop("own", {}))
        return ClientTraining(ClientResult(client, self.run.training_weights[client]), started)

    def train(
        self,
        client: ClientTraining,
        round: Round,
        earlier_rounds: int,
        on_step: StepCallback | None,
        on_action: ActionCallback,
    ) -> bool:
        """Goes on with a client's round, after it took part in so many earlier ones; whether it came to the end.

        The end may be that of the round's time: then the work says that it is late.
        """
        work = client.result
        self.control.set_activity(f"round {round.index + 1}: training", work)
        stream = self.client_batches(work.client)
        steps = self.run.length.num_steps(stream.steps_per_epoch, round, work.client)
        start = self.run.length.first_step(stream.steps_per_epoch, earlier_rounds)
        return self._train(client, stream, start, steps, round, on_step, on_action)

    def finetune(self, session: RoundSession, client: int, round: Round) -> None:
        """Gives the model a client's `personal_steps` on its first batches, from where it would begin its round."""
        training, stream = self.start_client(session, client), self.client_batches(client)
        leaves: ActionCallback = lambda client, wish: wish is Action.STOP  # noqa: E731
        self._train(training, stream, 0, self.run.personal_steps, round, None, leaves)

    def _train(
        self,
        client: ClientTraining,
        stream: ClientBatches,
        start: int,
        steps: int,
        round: Round,
        on_step: StepCallback | None,
        on_action: ActionCallback,
    ) -> bool:
        work = client.result
        stream.seconds = work.seconds_data
        batches = stream.batches(start + work.steps, steps - work.steps)
        self.model.module.train()
        began = perf_counter() - work.seconds_data - work.seconds_compute
        for wish in self._steps(client, batches, steps, round, on_step):
            self.has_stepped = True
            work.learning_rate = self.optimizer.param_groups[0]["lr"]
            work.seconds_data = stream.seconds
            work.seconds_compute = perf_counter() - began - stream.seconds
            if wish is Action.END_ROUND:
                work.timed_out, work.ends_round = work.steps < steps, True
                return True
            if wish is not Action.CONTINUE and on_action(client, wish):
                return False
        return True

    def commit(self, client: int, kept: ClientState) -> None:
        """Makes the state in which the client ended its round the one that it begins its next round with."""
        if not self.run.algorithm.keeps_client_state:
            return
        if self.model.personal_buffers:
            own = self.model.personal_statistics
            own.load(collectives.all_reduce_mean_in_silo(own.vector(), self.run.topology), own.counts())
        self.client_states[client] = {"personal": self.model.personal_state(), "algorithm": kept}
        if self.run.algorithm.client_optimizer_state == "keep":
            self.client_states[client] |= {**self.optimizer_state_dict(), "own": self.gradient_reducer.state_dict()}

    def optimizer_state_dict(self) -> dict[str, Any]:
        """The live state of what makes the steps: the optimizer's and the loss scaler's."""
        return {"optimizer": optimizer_state(self.optimizer), "scaler": self.scaler.state_dict()}

    def load_optimizer_state_dict(self, state: dict[str, Any]) -> None:
        """Puts an `optimizer_state_dict` back."""
        restore_optimizer_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def load_personal(self, client: int) -> None:
        """Puts the client's personal tensors into the model; a client that never trained has the `fresh` ones."""
        self.model.load_personal_state(self.client_states.get(client, {}).get("personal", self.initial_personal_state))

    def has_finite_statistics(self) -> bool:
        """Whether there is neither NaN nor infinity in the buffers of all replicas. A collective of the silo."""
        parts = [part.vector() for part in (self.model.statistics, self.model.personal_statistics) if part.has_buffers]
        if not parts:
            return True
        return bool(collectives.all_reduce_mean_in_silo(torch.cat(parts).sum(), self.run.topology).isfinite())

    def pool_statistics(self, vector: Tensor, counts: Tensor) -> None:
        """Gives the model, and all clients of the next round, the pooled statistics. A collective."""
        if not self.model.statistics.has_buffers:
            return
        if len(counts):
            collectives.all_reduce_max(counts)
        self.statistics = (vector, counts)
        self.model.statistics.load(vector, counts)

    def restore_statistics(self) -> None:
        """Gives the model the statistics that all clients of this round began with."""
        if self.model.statistics.has_buffers:
            self.model.statistics.load(*self.statistics)

    def client_batches(self, client: int) -> ClientBatches:
        """The batches of a client, as this replica sees them."""
        run, topology = self.run, self.run.topology
        least = 2 if self.has_batch_statistics else 0
        share = BatchShard(topology.replica, topology.num_replicas, self.micro_batch_size, least)
        ids = run.training_sets[client]
        members = torch.from_numpy(ids)

        def fetch(some: Tensor, epoch: int) -> Examples:
            return run.transforms.for_training(self.feeder.source, some, members, run.seed, epoch, topology.device)

        weights = run.weights.of(members) if run.weights else None
        ahead, in_order = self.feeder.prefetch, is_sequential(run.data.train)
        return ClientBatches(fetch, ids, client, run.batch_size, share, run.seed, weights, ahead, in_order)

    def warm_up_ddp(self) -> None:
        """Brings DDP to where it is after a step: it orders its buckets anew after the first one, which changes bits.

        A run that was loaded does this before its first step, one that is new must not. Nothing else changes: the loss
        is multiplied by zero, gradients are dropped, statistics put back; clients begin with streams of their own.
        """
        fetched = self.run.data.train.fetch(torch.arange(2))
        inputs, targets = self.run.transforms.for_evaluation(fetched, self.run.topology.device)
        self.model.module.train()
        (self.loss_sum(inputs, targets) * 0).backward()
        self.model.clear_gradients()
        self.gradient_reducer.load_state_dict({})
        self.restore_statistics()
        self.has_stepped = True

    def try_forward_backward(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward and backward of these examples, without a word to the other replicas."""
        self.model.module.train()
        self._forward_backward_no_sync((inputs, targets), self.loss_normalizer[len(inputs)], 0)

    def _steps(
        self,
        client: ClientTraining,
        batches: Iterator[ReplicaBatch],
        steps: int,
        round: Round,
        on_step: StepCallback | None,
    ) -> Iterator[Action]:
        """Trains on the batches; yields where the silo agreed on something to do, and at the end."""
        work, session = client.result, client.session
        seed = round.seed_for("model", work.client, self.run.topology.replica)
        optimizer, rounds, wish = self.optimizer, self.run.rounds, None
        for step, batch in enumerate(batches, work.steps):
            if self.skipped_windows and any(first <= step < last for first, last in self.skipped_windows):
                work.steps += 1
                continue
            self._set_learning_rates((round.index + step / steps) / rounds)
            session.before_step(step)
            loss_sum, units = self._accumulate_gradients(batch, seed + (step << 16))
            self.scaler.unscale(optimizer)
            session.adjust_gradients()
            work.gradient_norm = self.run.clip(self.model.trainable, measure=step + 1 == steps)
            if self.scaler.step(optimizer):
                work.lr_factors.append(self.lr_factor)
                if self.ema:
                    self.ema.update()
            else:
                self.gradient_reducer.rollback()
            self.model.clear_gradients()
            work.add(batch.examples, loss_sum, units)
            if on_step:
                on_step((step + 1) / steps, batch.examples, work.last_loss)
            wish = self.consensus.poll()
            if wish is not Action.CONTINUE:
                yield wish
        if wish is not None:
            yield Action.CONTINUE

    def _set_learning_rates(self, progress: float) -> None:
        factor = self.run.schedule(progress)
        if factor != self.lr_factor:
            for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = rate * factor
            self.lr_factor = factor

    def _accumulate_gradients(self, batch: ReplicaBatch, seed: int) -> tuple[Tensor, float]:
        """Adds the gradient of the mean loss over the silo's batch; this replica's loss sum and units."""
        *earlier, last = batch.micro_batches
        units = self.task.units(last[1])
        share = self.scaler.scale(self.loss_normalizer[batch.weight * units])
        losses = [self._forward_backward_no_sync(examples, share, seed + 1 + i) for i, examples in enumerate(earlier)]
        # Only the last micro-batch is a collective. Every replica runs one, if need be of no examples.
        loss_sum = self._forward_backward(last, share, seed)
        return sum(losses, start=loss_sum) if losses else loss_sum, batch.replica_weight * units

    def _forward_backward_no_sync(self, examples: MicroBatch, scale: Tensor, seed: int) -> Tensor:
        with self.no_sync():
            return self._forward_backward(examples, scale, seed)

    def _forward_backward(self, examples: MicroBatch, scale: Tensor, seed: int) -> Tensor:
        for generator in self.generators:
            generator.manual_seed(seed)
        count = len(examples[0])
        if self.has_batch_statistics and self.model.module.training != (count > 1):
            self.model.module.train(count > 1)  # a single example has no statistics of its own
        try:
            loss_sum = self.loss_sum(*examples)
            loss_sum.backward(scale)
        except (RuntimeError, MemoryError) as error:
            raise_if_oom(error, "micro_batch_size", self.run.micro_batch_size, count)
            raise
        return loss_sum.detach_()

    def _loss_sum(self, inputs: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        return self.task.loss_sum(self.ddp_model(inputs), targets, *weights)
