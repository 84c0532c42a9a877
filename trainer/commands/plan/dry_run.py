"""Rounds of one rank, without its peers: how long they take, what they hold in memory, what they would send."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from torch import Tensor

from trainer.algorithms.base import RoundSession
from trainer.algorithms.round import Round
from trainer.commands.plan.compression_costs import compression_costs, residual_bytes
from trainer.commands.plan.cost_model import CompressionCost, SiloLoad, StageTimes, Traffic
from trainer.commands.plan.memory import MemoryLines, memory_lines, peak_growth, resident_bytes
from trainer.commands.plan.null_transport import NullTransport
from trainer.distributed.gradients import FullPrecisionReducer
from trainer.distributed.transport import make_transport
from trainer.loop.consistency import model_fingerprint
from trainer.loop.local_trainer import ClientTraining
from trainer.loop.micro_batch_size import find_micro_batch_size
from trainer.loop.round import aggregate_round
from trainer.loop.round_metrics import RoundAccumulator
from trainer.loop.round_snapshot import RoundSnapshot
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models.flat import parameter_layout
from trainer.utils.timing import synchronized_time

MAX_CLIENTS = 2  # that train in a rehearsal: the second one makes the first one's sums necessary
MIN_ROUNDS = 5  # in the time for rehearsals


class DryRun:
    """A run, played by this rank alone: its topology is that of a world that is not there."""

    def __init__(self, run: Run):
        self.process = resident_bytes()  # bytes, of which the model is a part only where it is in the same memory
        if run.topology.device.type == "cpu":
            self.process -= sum(parameter.nbytes for parameter in run.module.parameters())
        self.run, self.silo, self.device = run, run.topology.silo, run.topology.device
        first = self.round = self.first = run.round(min(run.length.sync_rounds, run.rounds - 1))
        clients = run.assignments(first)[self.silo] or first.cohort or range(len(run.training_sets))
        self.clients = clients[:MAX_CLIENTS]
        wire = make_transport(
            run.topology, run.update_compression, parameter_layout(run.module, run.algorithm.is_shared)
        )
        self.transport = NullTransport(wire, run.topology.num_silos, len(first.cohort))
        # What packs gradients would look for the replicas that are not there.
        self.state = TrainState(replace(run, gradient_compression=FullPrecisionReducer()), transport=self.transport)
        find_micro_batch_size(self.state)
        self.run = replace(run, micro_batch_size=self.state.trainer.micro_batch_size)
        self.all_gathered = self.sent = 0
        self.vectors: list[tuple[Tensor, int]] = []
        self._run_round(0.0)  # the first one is slow, and makes what later ones find

    def stage_times(self, seconds: float) -> list[StageTimes]:
        """Those of rounds that take about so many seconds together, or of one that takes longer."""
        deadline = perf_counter() + seconds
        played: list[StageTimes] = []
        while not played or perf_counter() < deadline:
            played.append(self._run_round(seconds / MIN_ROUNDS / len(self.clients)))
        return played

    def traffic(self) -> Traffic:
        """What a round would have sent, at most."""
        return Traffic(
            self.run.gradient_compression.encoded_size(self.state.model.trainable), self.all_gathered, self.sent
        )

    def compression_costs(self) -> dict[str, CompressionCost]:
        """What each uplink makes of that."""
        return compression_costs(self.run, self.vectors)

    def memory(self) -> MemoryLines:
        """What this rank holds in the middle of a round."""
        session = self.state.algorithm.start_round(self.round)
        for client in self.clients[:-1]:
            self._finish_client(self._train(session, 0.0, client)[0])
        step = peak_growth(self.device, lambda: self._train(session, 0.0, self.clients[-1]))
        lines = memory_lines(self.state, session, self.transport, self.load(self.silo).clients, step, self.process)
        kept = residual_bytes(self.run, self.vectors)
        return lines | ({"residuals of the uplink": kept} if kept else {})

    def load(self, silo: int) -> SiloLoad:
        """What a silo, of as many replicas as this one, does in the first round that is as long as most are."""
        clients = self.run.assignments(self.first)[silo]
        done = [self._client_load(client) for client in clients]
        steps, examples = (sum(column) for column in zip(*done, strict=True)) if done else (0, 0)
        return SiloLoad(self.run.topology.num_replicas, len(clients), steps, examples)

    def _client_load(self, client: int) -> tuple[int, int]:
        """The steps of a client, and the examples that it sees."""
        stream = self.state.trainer.client_batches(client)
        steps = self.run.length.num_steps(stream.steps_per_epoch, self.first, client)
        epochs, rest = divmod(steps, stream.steps_per_epoch)
        return steps, epochs * len(stream.ids) + stream.bounds[rest]

    def _run_round(self, seconds: float) -> StageTimes:
        """A round in which each client trains for so long, and one step at least."""
        began = synchronized_time(self.device)
        session = self.state.algorithm.start_round(self.round)
        tally, training = RoundAccumulator(self.run, self.round, self.state.model.statistics), 0.0
        for client in self.clients:
            trained_client, spent = self._train(session, seconds, client)
            training += spent
            tally.add(trained_client.result, self._finish_client(trained_client))
        if self.run.evaluates(self.round.index):
            model_fingerprint(self.state.model)
        trained = synchronized_time(self.device)
        aggregate_round(self.state, self.round, RoundSnapshot(session, tally))
        ended = synchronized_time(self.device)
        self._next_round()
        steps = sum(work.steps for work in tally.results)
        overhead = trained - began - training
        return StageTimes(training / steps, overhead / len(self.clients), ended - trained)

    def _next_round(self) -> None:
        """Goes on to the next round, with the same clients; after the last one to the first again."""
        if self.transport.bytes_sent > self.sent:
            self.sent, self.vectors = self.transport.bytes_sent, self.transport.vectors
        self.all_gathered = max(self.all_gathered, self.transport.bytes_all_gathered)
        self.transport.reset()
        index = self.round.index + 1
        self.round = replace(self.round, index=index if index < self.run.rounds else self.first.index)

    def _train(self, session: RoundSession, seconds: float, client: int) -> tuple[ClientTraining, float]:
        return train_for(seconds, self.state, session, self.round, client)

    def _finish_client(self, client: ClientTraining) -> float:
        """The norm of the client's delta, which is among this silo's sums now."""
        norm, kept = client.session.finish(client.result)
        self.state.trainer.commit(client.result.client, kept)
        return norm


def train_for(
    seconds: float, state: TrainState, session: RoundSession, round: Round, client: int
) -> tuple[ClientTraining, float]:
    """What a client does in so many seconds, one step at least, and the seconds that its steps took."""
    trainer, device = state.trainer, state.run.topology.device
    training = trainer.start_client(session, client)
    began = synchronized_time(device)
    state.control.round_deadline = began + seconds
    trainer.train(training, round, int(state.participations[client]), None, lambda client, wish: False)
    trainer.consensus.flush()
    return training, synchronized_time(device) - began
