"""Local training: the clients of a silo, one after the other, on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import tee
from time import perf_counter

import torch
from torch import Tensor

from trainer.algorithms.base import ClientSession, ClientState, RoundSession, RunSession
from trainer.algorithms.client_result import ClientResult
from trainer.algorithms.round import Round
from trainer.data import is_read_by_batch, is_sequential
from trainer.data.loading.loader import BatchShard, ClientBatches, Examples, ReplicaBatch
from trainer.data.loading.prefetch import DeviceFeeder
from trainer.data.loading.readers import make_reader
from trainer.data.transforms import Compose
from trainer.data.transforms.compose import example_seed
from trainer.distributed.sharding import ParallelModel
from trainer.loop.batch_statistics import GlobalStatistics
from trainer.loop.client_store import RANK_STATE, ClientStore
from trainer.loop.control import Action, ActionConsensus, LoopControl
from trainer.loop.local_tensors import LocalTensors
from trainer.loop.run import Run
from trainer.loop.step import TrainStep
from trainer.models.buffers import preserved_buffers
from trainer.models.flat import FlatModel
from trainer.optim.ema import ExponentialMovingAverage
from trainer.optim.optimizers import enter_training, leave_training
from trainer.optim.state import clone

# Called after each step with the fraction of the client's round that is done, the examples of the step, and a function
# that returns its mean loss.
StepCallback = Callable[[float, int, Callable[[], float]], None]

# Called with what the silo has agreed to do other than continue; returns whether the client stops here.
ActionCallback = Callable[["ClientTraining", Action], bool]


@dataclass
class ClientTraining:
    """A client in training: what it has done so far, and the algorithm's session with it."""

    result: ClientResult
    session: ClientSession


class LocalTrainer:
    """Trains clients on one model, and keeps their states in between.

    Attributes:
        step: makes the steps.
        clients: what clients keep between their rounds.
        statistics: the batch statistics from which every client starts its round.
        local_tensors: frozen parameters and buffers that are this rank's own.
        consensus: what the replicas of the silo agree to do after a step.
        feeder: moves the training set to the device.
        reader: fetches the batches of training and of evaluation.
        transforms: of examples on their way to the model, fitted.
        micro_batch_size: examples that a replica puts through the model at once; None: its whole share of the batch.
        skipped_windows: windows [first, last) of the round's steps whose batches are left out.
        has_stepped: whether this replica has trained since the run began.
    """

    def __init__(
        self,
        run: Run,
        model: FlatModel,
        parallel: ParallelModel,
        frozen_digest: int,
        algorithm: RunSession,
        control: LoopControl,
        transforms: Compose,
        ema: ExponentialMovingAverage | None = None,
    ):
        self.run, self.model, self.algorithm, self.control = run, model, algorithm, control
        self.transforms = transforms
        self.consensus = ActionConsensus(run.topology, control)
        self.step = TrainStep(run, model, parallel, ema)
        self.feeder = DeviceFeeder(run.data.train, run.topology.device, run.cache_on_gpu)
        self.reader = make_reader(tuple(run.data.parts.values()), run.loading, run.topology.device)
        self.clients = ClientStore(model.personal_state())
        self.statistics = GlobalStatistics(model, run.topology)
        self.local_tensors = LocalTensors(model, frozen_digest)
        self.micro_batch_size = None if run.training.micro_batch_size == "auto" else run.training.micro_batch_size
        self.skipped_windows: list[tuple[int, int]] = []
        self.has_stepped = False

    def load_global_model(self) -> None:
        """Copy the global parameters and statistics into the model."""
        self.algorithm.reset_model()
        self.statistics.reset_model()

    def start_client(self, session: RoundSession, client: int, exclusive: bool = False) -> ClientTraining:
        """Start a client's round: give the model and the optimizer the state that it begins with.

        Args:
            session: the round.
            client: the client.
            exclusive: no other client begins before the next combination, and this one surely finishes.
        """
        kept, skips = self.clients.get(client), self.run.algorithm.skips_nonfinite_clients
        started = session.start_client(kept.get("algorithm", {}), exclusive)
        self.statistics.reset_model()
        self.load_personal(client)
        optimizer = kept.get("optimizer", {})
        # A client that is left out of the round must find its state as it was.
        self.step.load_state_dict(kept | {"optimizer": clone(optimizer) if skips else optimizer})
        # Where no client is left out there is no way back, and the memory is wanted.
        held_back = kept.get(RANK_STATE, {}) if skips else kept.pop(RANK_STATE, {})
        self.step.gradient_reducer.load_state_dict(held_back)
        return ClientTraining(ClientResult(client, self.run.training_weights[client]), started)

    def train(
        self,
        client: ClientTraining,
        round: Round,
        earlier_rounds: int,
        on_step: StepCallback | None,
        on_action: ActionCallback,
    ) -> bool:
        """Train a client to the end of its round, or from where it stopped.

        Args:
            client: the client.
            round: the round.
            earlier_rounds: the number of rounds in which the client took part before.
            on_step: called after each step.
            on_action: called when the silo has agreed on something other than to continue.

        Returns:
            Whether the client came to the end. That may be the deadline of the round: then its result says so.
        """
        result = client.result
        self.control.set_activity(f"round {round.index + 1}: training", result)
        batches = self.client_batches(result.client)
        steps = self.run.round.num_steps(batches.steps_per_epoch, round, result.client)
        start = self.run.round.first_step(batches.steps_per_epoch, earlier_rounds)
        return self._train(client, batches, start, steps, round, on_step, on_action)

    def finetune(self, session: RoundSession, client: int, round: Round) -> None:
        """Train the model for `personal_steps` on a client's first batches, from where it would begin its round."""

        def stop(client: ClientTraining, action: Action) -> bool:
            return action is Action.STOP

        training, batches = self.start_client(session, client), self.client_batches(client)
        self._train(training, batches, 0, self.run.eval.personal_steps, round, None, stop)

    def commit(self, client: int, algorithm_state: ClientState) -> None:
        """Store the state in which a client has ended its round, for its next one. A collective of the silo."""
        if not self.run.algorithm.keeps_client_state:
            return
        self.statistics.average_personal()
        state = {"personal": self.model.personal_state(), "algorithm": algorithm_state}
        if self.run.algorithm.client_optimizer_state == "keep":
            state |= {**self.step.state_dict(), RANK_STATE: self.step.gradient_reducer.state_dict()}
        self.clients.states[client] = state

    def load_personal(self, client: int) -> None:
        """Copy a client's personal parameters and buffers into the model."""
        self.model.load_personal_state(self.clients.personal(client))

    def average_personal(self) -> dict[str, Tensor]:
        """Return the mean personal parameters and buffers of all clients that have trained. A collective."""
        return self.clients.average_personal(self.model, self.run.training_weights, self.run.topology)

    def client_batches(self, client: int) -> ClientBatches:
        """Return the batches of a client, as this replica sees them."""
        run, topology = self.run, self.run.topology
        least = 2 if self.step.has_batch_statistics else 0
        is_even = self.step.parallel.forwards_together
        shard = BatchShard(topology.replica, topology.num_replicas, self.micro_batch_size, least, is_even)
        ids, source = run.training_sets[client], self.feeder.source
        members = torch.from_numpy(ids)

        def read(requests: Iterator[tuple[Tensor, int]]) -> Iterator[Examples]:
            wanted, ahead = tee(requests)
            fetched = self.reader.read(source, ((some, example_seed(run.seed, epoch)) for some, epoch in ahead))
            for (some, epoch), examples in zip(wanted, fetched, strict=True):
                yield self.transforms.for_training(source, some, members, run.seed, epoch, topology.device, examples)

        weights = run.weights.of(members) if run.weights else None
        units = None if run.unit_counts is None else run.unit_counts[members]
        return ClientBatches(
            read,
            ids,
            client,
            run.training.batch_size_of(len(ids)),
            shard,
            run.seed,
            weights,
            self.feeder.prefetch,
            is_sequential(source),
            units,
            is_read_by_batch(source),
        )

    def warm_up_ddp(self) -> None:
        """Bring DDP to where it is after a step, before the first step of a restored run. Nothing else changes."""
        run, ids = self.run, torch.arange(2)
        examples = self.transforms.for_training(run.data.train, ids, ids, run.seed, 0, run.topology.device)
        with preserved_buffers(self.model.module):
            self.step.warm_up(*examples)
        self.has_stepped = True

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
        result = client.result
        stream.seconds = result.seconds_data
        batches = stream.batches(start + result.steps, steps - result.steps)
        self.model.module.train()
        enter_training(self.step.optimizer)
        began = perf_counter() - result.seconds_data - result.seconds_compute
        for action in self._steps(client, batches, steps, round, on_step):
            self.has_stepped = True
            result.learning_rate = self.step.learning_rate
            result.seconds_data = stream.seconds
            result.seconds_compute = perf_counter() - began - stream.seconds
            if action is Action.END_ROUND:
                result.timed_out, result.ends_round = result.steps < steps, True
                break
            if action is not Action.CONTINUE and on_action(client, action):
                return False
        leave_training(self.step.optimizer)
        return True

    def _steps(
        self,
        client: ClientTraining,
        batches: Iterator[ReplicaBatch],
        steps: int,
        round: Round,
        on_step: StepCallback | None,
    ) -> Iterator[Action]:
        """Train on the batches; yield what the silo agrees to do, unless it is to continue, and once at the end."""
        result, session, train_step = client.result, client.session, self.step
        seed = round.seed_for("model", result.client, self.run.topology.replica)
        rounds, action = self.run.rounds, None
        for step, batch in enumerate(batches, result.steps):
            if self.skipped_windows and any(first <= step < last for first, last in self.skipped_windows):
                result.steps += 1
                continue
            train_step.scheduler.set_progress((round.index + step / steps) / rounds)
            session.before_step(step)
            train_step(batch, seed + (step << 16), session, result, measure_norm=step + 1 == steps)
            if on_step:
                on_step((step + 1) / steps, batch.examples, result.last_loss)
            action = self.consensus.poll()
            if action is not Action.CONTINUE:
                yield action
        if action is not None:
            yield Action.CONTINUE
