"""Rounds of one rank, without its peers: how long they take, what they hold in memory, what they would send."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from torch import Tensor

from trainer.algorithms.base import RoundSession
from trainer.algorithms.round import Round
from trainer.commands.plan.compression_costs import packings, residuals
from trainer.commands.plan.cost_model import Load, Pace, Packing, Traffic
from trainer.commands.plan.memory import Lines, growth, lines_of, resident
from trainer.commands.plan.null_transport import Silent
from trainer.distributed.gradients import FullPrecision
from trainer.distributed.transport import wire_of
from trainer.loop.evaluate import fingerprint
from trainer.loop.local_trainer import ClientTraining
from trainer.loop.micro_batch_size import settle_micro_batch
from trainer.loop.round import combine
from trainer.loop.round_metrics import Tally
from trainer.loop.round_snapshot import Inside
from trainer.loop.run import Run
from trainer.loop.train_state import State
from trainer.models.flat import places_of
from trainer.utils.timing import clock

MOST_CLIENTS = 2  # that train in a rehearsal: the second one makes the first one's sums necessary
LEAST_ROUNDS = 5  # in the time for rehearsals


class Rehearsal:
    """A run, played by this rank alone: its topology is that of a world that is not there."""

    def __init__(self, run: Run):
        self.process = resident()  # bytes, of which the model is a part only where it is in the same memory
        if run.topology.device.type == "cpu":
            self.process -= sum(parameter.nbytes for parameter in run.module.parameters())
        self.run, self.silo, self.device = run, run.topology.silo, run.topology.device
        first = self.round = self.first = run.round(min(run.length.sync_rounds, run.rounds - 1))
        clients = run.assignments(first)[self.silo] or first.cohort or range(len(run.training_sets))
        self.clients = clients[:MOST_CLIENTS]
        wire = wire_of(run.topology, run.update_compression, places_of(run.module, run.algorithm.is_shared))
        self.wire = Silent(wire, run.topology.num_silos, len(first.cohort))
        # What packs gradients would look for the replicas that are not there.
        self.state = State(replace(run, gradient_compression=FullPrecision()), wire=self.wire)
        settle_micro_batch(self.state)
        self.run = replace(run, micro_batch_size=self.state.trainer.micro_batch_size)
        self.joined = self.sent = 0
        self.vectors: list[tuple[Tensor, int]] = []
        self._play(0.0)  # the first one is slow, and makes what later ones find

    def paces(self, seconds: float) -> list[Pace]:
        """Those of rounds that take about so many seconds together, or of one that takes longer."""
        deadline = perf_counter() + seconds
        played: list[Pace] = []
        while not played or perf_counter() < deadline:
            played.append(self._play(seconds / LEAST_ROUNDS / len(self.clients)))
        return played

    def traffic(self) -> Traffic:
        """What a round would have sent, at most."""
        return Traffic(self.run.gradient_compression.size(self.state.model.trainable), self.joined, self.sent)

    def packings(self) -> dict[str, Packing]:
        """What each uplink makes of that."""
        return packings(self.run, self.vectors)

    def memory(self) -> Lines:
        """What this rank holds in the middle of a round."""
        session = self.state.algorithm.start_round(self.round)
        for client in self.clients[:-1]:
            self._end(self._train(session, 0.0, client)[0])
        step = growth(self.device, lambda: self._train(session, 0.0, self.clients[-1]))
        lines = lines_of(self.state, session, self.wire, self.load(self.silo).clients, step, self.process)
        kept = residuals(self.run, self.vectors)
        return lines | ({"residuals of the uplink": kept} if kept else {})

    def load(self, silo: int) -> Load:
        """What a silo, of as many replicas as this one, does in the first round that is as long as most are."""
        clients = self.run.assignments(self.first)[silo]
        done = [self._done(client) for client in clients]
        steps, examples = (sum(column) for column in zip(*done, strict=True)) if done else (0, 0)
        return Load(self.run.topology.num_replicas, len(clients), steps, examples)

    def _done(self, client: int) -> tuple[int, int]:
        """The steps of a client, and the examples that it sees."""
        stream = self.state.trainer.stream(client)
        steps = self.run.length.of(stream.steps_per_epoch, self.first, client)
        epochs, rest = divmod(steps, stream.steps_per_epoch)
        return steps, epochs * len(stream.ids) + stream.bounds[rest]

    def _play(self, seconds: float) -> Pace:
        """A round in which each client trains for so long, and one step at least."""
        began = clock(self.device)
        session = self.state.algorithm.start_round(self.round)
        tally, training = Tally(self.run, self.round, self.state.model.statistics), 0.0
        for client in self.clients:
            trained_client, spent = self._train(session, seconds, client)
            training += spent
            tally.add(trained_client.result, self._end(trained_client))
        if self.run.evaluates(self.round.index):
            fingerprint(self.state.model)
        trained = clock(self.device)
        combine(self.state, self.round, Inside(session, tally))
        ended = clock(self.device)
        self._turn()
        steps = sum(work.steps for work in tally.works)
        overhead = trained - began - training
        return Pace(training / steps, overhead / len(self.clients), ended - trained)

    def _turn(self) -> None:
        """Goes on to the next round, with the same clients; after the last one to the first again."""
        if self.wire.bytes_sent > self.sent:
            self.sent, self.vectors = self.wire.bytes_sent, self.wire.vectors
        self.joined = max(self.joined, self.wire.bytes_joined)
        self.wire.forget()
        index = self.round.index + 1
        self.round = replace(self.round, index=index if index < self.run.rounds else self.first.index)

    def _train(self, session: RoundSession, seconds: float, client: int) -> tuple[ClientTraining, float]:
        return train_for(seconds, self.state, session, self.round, client)

    def _end(self, client: ClientTraining) -> float:
        """The norm of the client's delta, which is among this silo's sums now."""
        norm, kept = client.session.finish(client.result)
        self.state.trainer.commit(client.result.client, kept)
        return norm


def train_for(
    seconds: float, state: State, session: RoundSession, round: Round, client: int
) -> tuple[ClientTraining, float]:
    """What a client does in so many seconds, one step at least, and the seconds that its steps took."""
    trainer, device = state.trainer, state.run.topology.device
    training = trainer.begin(session, client)
    began = clock(device)
    state.contact.finish_at = began + seconds
    trainer.train(training, round, int(state.participations[client]), None, lambda client, wish: False)
    trainer.vote.close()
    return training, clock(device) - began
