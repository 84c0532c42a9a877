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
from trainer.algorithms.client_result import Work
from trainer.algorithms.round import Round
from trainer.data import is_in_order
from trainer.data.loading.loader import Batch, Examples, MicroBatch, Share, Stream
from trainer.data.loading.prefetch import Feeding
from trainer.distributed import collectives
from trainer.distributed.gradients.ddp import no_sync, wrap
from trainer.loop.control import Contact, Vote, Wish
from trainer.loop.loss_normalizer import Shares
from trainer.loop.run import Run
from trainer.models.flat import FlatModel
from trainer.optim import Scaled, Scaler, Unscaled
from trainer.optim.ema import MovingAverage
from trainer.optim.optimizers import clone_state, optimizer_state, restore_optimizer_state
from trainer.utils.compile import compiled
from trainer.utils.oom import check_room
from trainer.utils.seeding import default_generators

# Told after each step: the part done of the client's round, the examples of the step, and its mean loss when asked.
Watch = Callable[[float, int, Callable[[], float]], None]

# Told what the silo has agreed on, when that is not to go on: saves; says whether the client is to stop here.
Pause = Callable[["ClientTraining", Wish], bool]


@dataclass
class ClientTraining:
    """A client in training: what it has done so far, and the algorithm's session with it."""

    result: Work
    session: ClientSession


class LocalTrainer:
    """Trains one client after the other on one model and one optimizer, and keeps what is a client's own in between.

    vote        what the replicas agree on after a step
    states      what clients keep between their rounds, by client: optimizer state, personal tensors, the algorithm's
    fresh       the personal tensors of a client that has none yet
    has_stepped whether this replica has trained since the run began
    scaler      of the loss, for float16; its state is a client's own
    gradients   how they are averaged over the silo; what is not sent yet is a client's own, on each replica
    feeding     the training set, as the device gets it
    skipped     windows [first, last) of the round's steps whose batches are not trained on
    micro_batch_size  the run's, or what was found to fit
    statistics  the global BatchNorm statistics and counters, from which every client starts its round
    average     of the weights, if there is one and steps move the global ones
    outputs     the bare model, in the precision of the run, for evaluation
    """

    def __init__(
        self,
        run: Run,
        model: FlatModel,
        algorithm: RunSession,
        contact: Contact,
        average: MovingAverage | None = None,
    ):
        self.run, self.task, self.model, self.algorithm, self.average = run, run.task, model, algorithm, average
        self.contact, self.vote = contact, Vote(run.topology, contact)
        self.has_batch_statistics = model.has_batch_statistics
        self.scaler: Scaler = Scaled(run.topology.device) if run.autocast == torch.float16 else Unscaled()
        wrapped, self.gradients = wrap(model.module, run.topology, run.gradient_compression, self.scaler)
        self.no_sync = partial(no_sync, wrapped)
        self.wrapped, self.outputs = compiled(wrapped, run.compile_backend), compiled(model.module, run.compile_backend)
        self.loss_sum = self._loss_sum
        if run.autocast:
            autocast = torch.autocast(run.topology.device.type, run.autocast)
            self.loss_sum, self.outputs = autocast(self.loss_sum), autocast(self.outputs)
        self.optimizer = run.optimizer(model.named_trainable)
        self.rates, self.factor = [group["lr"] for group in self.optimizer.param_groups], 1.0
        self.generators = default_generators(run.topology.device)
        self.feeding = Feeding(run.data.train, run.topology.device, run.cache_on_gpu)
        self.shares = Shares(run.topology, torch.promote_types(model.shared.dtype, torch.float32))
        self.states: dict[int, dict[str, Any]] = {}
        self.fresh = model.personal_state()
        self.has_stepped = False
        self.micro_batch_size = None if run.micro_batch_size == "auto" else run.micro_batch_size
        self.skipped: list[tuple[int, int]] = []
        self.statistics = (model.statistics.vector(), model.statistics.counts())

    def begin_global(self) -> None:
        """Puts the global model in place, as if nobody had trained."""
        self.algorithm.reset_model()
        self.restore_statistics()

    def begin(self, session: RoundSession, client: int, exclusive: bool = False) -> ClientTraining:
        """A client about to begin its round, with the model and the optimizer as it needs them.

        `exclusive`: before the next combination no other client begins, and this one surely comes to it.
        """
        kept, skips = self.states.get(client, {}), self.run.algorithm.skips_nonfinite_clients
        started = session.start_client(kept.get("algorithm", {}), exclusive)
        self.restore_statistics()
        self.load_personal(client)
        state = kept.get("optimizer", {})
        # A client that is left out of the round must find its state as it was.
        restore_optimizer_state(self.optimizer, clone_state(state) if skips else state)
        self.scaler.load_state_dict(kept.get("scaler", {}))
        # Without a vote there is no way back, and the memory is wanted.
        self.gradients.load_state_dict(kept.get("own", {}) if skips else kept.pop("own", {}))
        return ClientTraining(Work(client, self.run.training_weights[client]), started)

    def train(
        self, client: ClientTraining, round: Round, earlier_rounds: int, watch: Watch | None, pause: Pause
    ) -> bool:
        """Goes on with a client's round, after it took part in so many earlier ones; whether it came to the end.

        The end may be that of the round's time: then the work says that it is late.
        """
        work = client.result
        self.contact.at(f"round {round.index + 1}: training", work)
        stream = self.stream(work.client)
        steps = self.run.length.of(stream.steps_per_epoch, round, work.client)
        start = self.run.length.begins_at(stream.steps_per_epoch, earlier_rounds)
        return self._train(client, stream, start, steps, round, watch, pause)

    def tune(self, session: RoundSession, client: int, round: Round) -> None:
        """Gives the model a client's `personal_steps` on its first batches, from where it would begin its round."""
        training, stream = self.begin(session, client), self.stream(client)
        leaves: Pause = lambda client, wish: wish is Wish.LEAVE  # noqa: E731
        self._train(training, stream, 0, self.run.personal_steps, round, None, leaves)

    def _train(
        self,
        client: ClientTraining,
        stream: Stream,
        start: int,
        steps: int,
        round: Round,
        watch: Watch | None,
        pause: Pause,
    ) -> bool:
        work = client.result
        stream.seconds = work.seconds_data
        batches = stream.batches(start + work.steps, steps - work.steps)
        self.model.module.train()
        began = perf_counter() - work.seconds_data - work.seconds_compute
        for wish in self._steps(client, batches, steps, round, watch):
            self.has_stepped = True
            work.learning_rate = self.optimizer.param_groups[0]["lr"]
            work.seconds_data = stream.seconds
            work.seconds_compute = perf_counter() - began - stream.seconds
            if wish is Wish.FINISH:
                work.is_late, work.is_last = work.steps < steps, True
                return True
            if wish is not Wish.GO_ON and pause(client, wish):
                return False
        return True

    def commit(self, client: int, kept: ClientState) -> None:
        """Makes the state in which the client ended its round the one that it begins its next round with."""
        if not self.run.algorithm.keeps_client_state:
            return
        if self.model.personal_buffers:
            own = self.model.personal_statistics
            own.load(collectives.mean_in_silo(own.vector(), self.run.topology), own.counts())
        self.states[client] = {"personal": self.model.personal_state(), "algorithm": kept}
        if self.run.algorithm.client_optimizer_state == "keep":
            self.states[client] |= {**self.inner_state(), "own": self.gradients.state_dict()}

    def inner_state(self) -> dict[str, Any]:
        """The live state of what makes the steps: the optimizer's and the loss scaler's."""
        return {"optimizer": optimizer_state(self.optimizer), "scaler": self.scaler.state_dict()}

    def load_inner_state(self, state: dict[str, Any]) -> None:
        """Puts an `inner_state` back."""
        restore_optimizer_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def load_personal(self, client: int) -> None:
        """Puts the client's personal tensors into the model; a client that never trained has the `fresh` ones."""
        self.model.load_personal_state(self.states.get(client, {}).get("personal", self.fresh))

    def has_finite_statistics(self) -> bool:
        """Whether there is neither NaN nor infinity in the buffers of all replicas. A collective of the silo."""
        parts = [part.vector() for part in (self.model.statistics, self.model.personal_statistics) if part.any]
        if not parts:
            return True
        return bool(collectives.mean_in_silo(torch.cat(parts).sum(), self.run.topology).isfinite())

    def pool_statistics(self, vector: Tensor, counts: Tensor) -> None:
        """Gives the model, and all clients of the next round, the pooled statistics. A collective."""
        if not self.model.statistics.any:
            return
        if len(counts):
            collectives.maximum(counts)
        self.statistics = (vector, counts)
        self.model.statistics.load(vector, counts)

    def restore_statistics(self) -> None:
        """Gives the model the statistics that all clients of this round began with."""
        if self.model.statistics.any:
            self.model.statistics.load(*self.statistics)

    def stream(self, client: int) -> Stream:
        """The batches of a client, as this replica sees them."""
        run, topology = self.run, self.run.topology
        least = 2 if self.has_batch_statistics else 0
        share = Share(topology.replica, topology.num_replicas, self.micro_batch_size, least)
        ids = run.training_sets[client]
        members = torch.from_numpy(ids)

        def fetch(some: Tensor, epoch: int) -> Examples:
            return run.transforms.train(self.feeding.source, some, members, run.seed, epoch, topology.device)

        weights = run.weights.of(members) if run.weights else None
        ahead, in_order = self.feeding.ahead, is_in_order(run.data.train)
        return Stream(fetch, ids, client, run.batch_size, share, run.seed, weights, ahead, in_order)

    def warm_up(self) -> None:
        """Brings DDP to where it is after a step: it orders its buckets anew after the first one, which changes bits.

        A run that was loaded does this before its first step, one that is new must not. Nothing else changes: the loss
        is multiplied by zero, gradients are dropped, statistics put back; clients begin with streams of their own.
        """
        fetched = self.run.data.train.fetch(torch.arange(2))
        inputs, targets = self.run.transforms.judge(fetched, self.run.topology.device)
        self.model.module.train()
        (self.loss_sum(inputs, targets) * 0).backward()
        self.model.drop_gradients()
        self.gradients.load_state_dict({})
        self.restore_statistics()
        self.has_stepped = True

    def rehearse(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward and backward of these examples, without a word to the other replicas."""
        self.model.module.train()
        self._unsynchronised((inputs, targets), self.shares[len(inputs)], 0)

    def _steps(
        self, client: ClientTraining, batches: Iterator[Batch], steps: int, round: Round, watch: Watch | None
    ) -> Iterator[Wish]:
        """Trains on the batches; yields where the silo agreed on something to do, and at the end."""
        work, session = client.result, client.session
        seed = round.seed_for("model", work.client, self.run.topology.replica)
        optimizer, rounds, wish = self.optimizer, self.run.rounds, None
        for step, batch in enumerate(batches, work.steps):
            if self.skipped and any(first <= step < last for first, last in self.skipped):
                work.steps += 1
                continue
            self._set_rates((round.index + step / steps) / rounds)
            session.before_step(step)
            loss_sum, units = self._backward(batch, seed + (step << 16))
            self.scaler.unscale(optimizer)
            session.adjust_gradients()
            work.gradient_norm = self.run.clip(self.model.trainable, measure=step + 1 == steps)
            if self.scaler.step(optimizer):
                work.factors.append(self.factor)
                if self.average:
                    self.average.update()
            else:
                self.gradients.revoke()
            self.model.drop_gradients()
            work.add(batch.examples, loss_sum, units)
            if watch:
                watch((step + 1) / steps, batch.examples, work.last_loss)
            wish = self.vote.after_step()
            if wish is not Wish.GO_ON:
                yield wish
        if wish is not None:
            yield Wish.GO_ON

    def _set_rates(self, progress: float) -> None:
        factor = self.run.schedule(progress)
        if factor != self.factor:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.factor = factor

    def _backward(self, batch: Batch, seed: int) -> tuple[Tensor, float]:
        """Adds the gradient of the mean loss over the silo's batch; this replica's loss sum and units."""
        *earlier, last = batch.micro_batches
        units = self.task.units(last[1])
        share = self.scaler.scale(self.shares[batch.weight * units])
        losses = [self._unsynchronised(examples, share, seed + 1 + i) for i, examples in enumerate(earlier)]
        # Only the last micro-batch is a collective. Every replica runs one, if need be of no examples.
        loss_sum = self._micro_batch(last, share, seed)
        return sum(losses, start=loss_sum) if losses else loss_sum, batch.own * units

    def _unsynchronised(self, examples: MicroBatch, share: Tensor, seed: int) -> Tensor:
        with self.no_sync():
            return self._micro_batch(examples, share, seed)

    def _micro_batch(self, examples: MicroBatch, share: Tensor, seed: int) -> Tensor:
        for generator in self.generators:
            generator.manual_seed(seed)
        count = len(examples[0])
        if self.has_batch_statistics and self.model.module.training != (count > 1):
            self.model.module.train(count > 1)  # a single example has no statistics of its own
        try:
            loss_sum = self.loss_sum(*examples)
            loss_sum.backward(share)
        except (RuntimeError, MemoryError) as error:
            check_room(error, "micro_batch_size", self.run.micro_batch_size, count)
            raise
        return loss_sum.detach_()

    def _loss_sum(self, inputs: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        return self.task.loss_sum(self.wrapped(inputs), targets, *weights)
