"""Rounds of one rank without its peers: their time, memory and traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

from torch import Tensor

from trainer.algorithms.base import RoundSession
from trainer.algorithms.round import Round
from trainer.commands.plan.cost_model import SiloLoad, StageTimes, Traffic
from trainer.commands.plan.memory import MemoryLines, memory_lines, peak_growth, resident_bytes
from trainer.commands.plan.null_transport import NullTransport
from trainer.distributed.gradients import FullPrecisionReducer
from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import chunks_of
from trainer.loop.consistency import model_fingerprint
from trainer.loop.exchange import InWorld
from trainer.loop.local_trainer import ClientTraining
from trainer.loop.micro_batch_size import find_micro_batch_size
from trainer.loop.round import aggregate_round
from trainer.loop.round_metrics import RoundAccumulator
from trainer.loop.round_snapshot import RoundSnapshot
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models import describe_model
from trainer.utils.timing import synchronized_time

MAX_CLIENTS = 2  # clients of a dry round: the second one makes the silo accumulate their sum
MIN_ROUNDS = 5  # rounds in the time that is given


class DryRun:
    """A run that this rank plays alone, as a rank of the target world.

    Its topology has no process groups.
    """

    def __init__(self, run: Run):
        self.process = resident_bytes()
        self.run, self.silo, self.device = run, run.topology.silo, run.topology.device
        self.round = self.first = _first_usual_round(run)
        self.clients = _clients_of(run, self.silo, self.first)[:MAX_CLIENTS]
        # Other reducers would look for the replicas of the silo.
        alone = replace(run, gradient_compression=FullPrecisionReducer)
        self.state = TrainState(alone, make_exchange=self._make_exchange)
        module = self.state.model.module
        self.model = describe_model(module).splitlines()[0]
        if self.device.type == "cpu":  # where the parameters are a part of the process
            self.process -= sum(parameter.nbytes for parameter in module.parameters())
        find_micro_batch_size(self.state)
        found = self.state.trainer.micro_batch_size
        self.run = replace(run, training=replace(run.training, micro_batch_size=found))
        self.all_gathered = self.sent = 0
        self._run_round(0.0)  # warm-up; it also allocates the state that later rounds find

    def _make_exchange(self, *arguments: Any) -> InWorld:
        exchange = InWorld(*arguments)
        self.transport = NullTransport(exchange.transport, self.run.topology.num_silos, len(self.first.cohort))
        exchange.transport = self.transport
        return exchange

    def stage_times(self, seconds: float) -> list[StageTimes]:
        """Return the times of at least one round, for about `seconds`."""
        deadline = perf_counter() + seconds
        times: list[StageTimes] = []
        while not times or perf_counter() < deadline:
            times.append(self._run_round(seconds / MIN_ROUNDS / len(self.clients)))
        return times

    def traffic(self) -> Traffic:
        """Return the largest traffic of a round so far."""
        gradients = self.run.gradient_compression().encoded_size(self.state.model.trainable)
        return Traffic(gradients, self.all_gathered, self.sent)

    def meeting(self) -> tuple[int, int]:
        """Return the bytes of the vectors that a site brings to the coordinator in a round, and of those it gets."""
        session = self.state.algorithm.start_round(self.round)
        self._finish_client(self._train(session, 0.0, self.clients[0])[0])
        brought, fetched = session.contribution(), self.state.algorithm.global_state()
        return sum(map(self._sent_bytes, brought.values())), sum(vector.nbytes for vector in fetched.values())

    def _sent_bytes(self, vector: Tensor) -> int:
        """Return the bytes as which a site sends a vector."""
        compression = self.run.update_compression
        if compression.is_identity is True or compression.matrix_rank is not None:  # sites refuse the latter
            return vector.nbytes
        return sum(compression.encoded_size(span.stop - span.start) for span in chunks_of(slice(0, vector.numel())))

    def memory(self) -> MemoryLines:
        """Return what this rank holds in the middle of a round."""
        session = self.state.algorithm.start_round(self.round)
        for client in self.clients[:-1]:
            self._finish_client(self._train(session, 0.0, client)[0])
        step = peak_growth(self.device, lambda: self._train(session, 0.0, self.clients[-1]))
        clients = self.load(self.silo).clients
        return memory_lines(self.state, session, self.transport, clients, step, self.process)

    def load(self, silo: int) -> SiloLoad:
        """Return the work of a silo of this size, in the first round of the usual length."""
        clients = self.run.assignments(self.first)[silo]
        loads = [self._client_load(client) for client in clients]
        steps, examples = (sum(column) for column in zip(*loads, strict=True)) if loads else (0, 0)
        return SiloLoad(self.run.topology.num_replicas, len(clients), steps, examples)

    def _client_load(self, client: int) -> tuple[int, int]:
        """Return a client's number of steps, and of the examples in them."""
        batches = self.state.trainer.client_batches(client)
        steps = self.run.round.num_steps(batches.steps_per_epoch, self.first, client)
        epochs, rest = divmod(steps, batches.steps_per_epoch)
        return steps, epochs * len(batches.ids) + batches.bounds[rest]

    def _run_round(self, seconds: float) -> StageTimes:
        """Run a round in which each client trains for `seconds`, and at least one step."""
        began = synchronized_time(self.device)
        session = self.state.algorithm.start_round(self.round)
        results, training = RoundAccumulator(self.run, self.round, self.state.model.statistics), 0.0
        for client in self.clients:
            trained_client, spent = self._train(session, seconds, client)
            training += spent
            results.add(trained_client.result, self._finish_client(trained_client))
        if self.run.evaluates(self.round.index):
            model_fingerprint(self.state.model)
        trained = synchronized_time(self.device)
        aggregate_round(self.state, self.round, RoundSnapshot(session, results))
        ended = synchronized_time(self.device)
        self._advance()
        steps = sum(result.steps for result in results.results)
        overhead = trained - began - training
        return StageTimes(training / steps, overhead / len(self.clients), ended - trained)

    def _advance(self) -> None:
        """Record the round's traffic and go to the next one, cyclically."""
        self.sent = max(self.sent, self.transport.bytes_sent)
        self.all_gathered = max(self.all_gathered, self.transport.bytes_all_gathered)
        self.transport.reset()
        index = self.round.index + 1
        self.round = replace(self.round, index=index if index < self.run.rounds else self.first.index)

    def _train(self, session: RoundSession, seconds: float, client: int) -> tuple[ClientTraining, float]:
        return train_for(seconds, self.state, session, self.round, client)

    def _finish_client(self, client: ClientTraining) -> float:
        """Add a client's update to the sums of the silo; its norm."""
        norm, kept = client.session.finish(client.result)
        self.state.trainer.commit(client.result.client, kept)
        return norm


def measure_step_seconds(run: Run, topology: Topology, seconds: float) -> float:
    """Measure the median step of this rank's silo, whose replicas train together.

    All ranks must call it.

    Args:
        run: planned by `DryRun`, for silos of these sizes.
        topology: the real one, with process groups.
        seconds: time to measure for.
    """
    state = TrainState(replace(run, topology=topology))
    round = _first_usual_round(run)
    client = _clients_of(run, topology.silo, round)[0]
    session = state.algorithm.start_round(round)
    train_for(0.0, state, session, round, client)  # warm-up
    trained = [train_for(seconds / MIN_ROUNDS, state, session, round, client) for _ in range(MIN_ROUNDS)]
    return median(spent / training.result.steps for training, spent in trained)


def train_for(
    seconds: float, state: TrainState, session: RoundSession, round: Round, client: int
) -> tuple[ClientTraining, float]:
    """Train a client for `seconds`, and at least one step.

    Returns the training and the seconds that its steps took.
    """
    trainer, device = state.trainer, state.run.topology.device
    training = trainer.start_client(session, client)
    began = synchronized_time(device)
    state.control.round_deadline = began + seconds
    trainer.train(training, round, int(state.participations[client]), None, lambda client, action: False)
    trainer.consensus.flush()
    return training, synchronized_time(device) - began


def _first_usual_round(run: Run) -> Round:
    """Return the first round after those that synchronize every step."""
    return run.sample_round(min(run.round.sync_rounds, run.rounds - 1))


def _clients_of(run: Run, silo: int, round: Round) -> Sequence[int]:
    """Return the clients of a silo in a round; any other clients if it has none."""
    return run.assignments(round)[silo] or round.cohort or range(len(run.training_sets))
