"""The loop: rounds of local work, each ended by one combination. Synchronous or federated, it is this loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter

import torch

from trainer import comm
from trainer.checkpoint import Checkpoints, Saved
from trainer.cohort import Round
from trainer.evaluate import check_agreement, client_sums, exhibits, fingerprint
from trainer.local import Watch
from trainer.metrics import Metrics, Sink
from trainer.report import Tally, evaluation_metrics, round_metrics
from trainer.run import Run
from trainer.state import State


def fit(
    run: Run,
    sinks: Sequence[Sink] = (),
    checkpoints: Checkpoints | None = None,
    start: Saved | None = None,
    watch: Watch | None = None,
    until: int | None = None,
) -> Metrics:
    """The result of a run: the figures of its last round and its totals, equal on every rank.

    Trains from the checkpoint `start`, or anew, to the end, or to `until` rounds. Every rank calls it; `sinks` and
    `watch` are rank 0's. Raises RuntimeError when replicas that must be equal are not.
    """
    state = State(run)
    if start:
        state.restore(start)
    for index in range(state.progress.rounds, until or run.rounds):
        began = perf_counter()
        metrics = train_round(state, run.round(index), watch)
        if run.evaluates(index):
            metrics |= evaluate(state)
        metrics = state.progress.advance(metrics, perf_counter() - began)
        for sink in sinks:
            sink.record(metrics)
        if checkpoints and run.saves(index):
            state.save(checkpoints)
    result = state.progress.result()
    if state.progress.rounds == run.rounds:
        shown = exhibits(state.trainer)
        for sink in sinks:
            sink.finish(result, shown)
    return result


def train_round(state: State, round: Round, watch: Watch | None = None) -> Metrics:
    """The figures of one round: this silo trains its clients of the cohort, then all silos combine."""
    run, algorithm, trainer = state.run, state.run.algorithm, state.trainer
    began = perf_counter()
    tally = Tally(run, round, state.model.statistics)
    clients = run.assignments(round)[run.topology.silo]
    algorithm.begin_round(round)
    for position, client in enumerate(clients):
        start = round.index + position / len(clients)
        watch_client = watch and _part(watch, start / run.rounds, 1 / (len(clients) * run.rounds))
        work = trainer.train(client, round, int(state.participations[client]), watch_client)
        norm = algorithm.contribute(client, work.examples)
        if math.isfinite(norm):
            trainer.commit(client)
        tally.add(work, norm)
    state.local_fingerprint = fingerprint(state.model) if run.evaluates(round.index) else 0
    metrics = combine(state, round, tally)
    seconds = perf_counter() - began
    return metrics | {"examples_per_second": metrics["round/examples"] / seconds, "seconds/round": seconds}


def combine(state: State, round: Round, tally: Tally) -> Metrics:
    """The figures of a round, after the header's scalars and then the vectors have gone between the silos.

    The scalars go first: they say who is there, and what each silo's share of the whole is.
    """
    algorithm = state.run.algorithm
    arrived = perf_counter()
    # Every silo reaches this line, each round, those without clients too: it is a collective.
    own = algorithm.header() if state.run.topology.is_leader else dict.fromkeys(algorithm.header(), 0.0)
    sums, tables = comm.sum_header({**own, **tally.scalars()}, tally.tables())
    met = perf_counter()
    update_norm = 0.0
    if sums["weight"] > 0:
        total = state.wire.sum(algorithm.payload(sums["weight"]))
        update_norm = float(torch.linalg.vector_norm(total))
        algorithm.apply(total)
        state.trainer.pool_statistics(tables["statistics"] / sums["examples"], tally.counts)
    else:
        algorithm.skip()
        state.trainer.restore_statistics()
    state.participations[list(round.cohort)] += 1
    metrics = round_metrics(state.run, round, sums, tables, update_norm)
    metrics |= tally.seconds() | {"seconds/waiting": met - arrived, "seconds/communication": perf_counter() - met}
    return metrics | {"bytes_between_silos": state.wire.bytes_sent}


def evaluate(state: State) -> Metrics:
    """The figures of the validation and test sets, after a check that what must be equal is equal."""
    run, clients = state.run, state.run.clients
    began = perf_counter()
    check_agreement(run.topology, state.local_fingerprint, state.model)
    tables = {"test": client_sums(state.trainer, run.data.test, clients.test)}
    if any(len(ids) for ids in clients.validation):
        tables["validation"] = client_sums(state.trainer, run.data.train, clients.validation)
    metrics: Metrics = {}
    for name, table in comm.sum_header({}, tables)[1].items():
        metrics |= evaluation_metrics(run, name, table)
    return metrics | {"seconds/evaluation": perf_counter() - began}


def _part(watch: Watch, start: float, length: float) -> Watch:
    """The watch of one client, whose round is the part [start, start + length) of the run."""
    return lambda done, examples, loss: watch(start + done * length, examples, loss)
