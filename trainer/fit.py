"""The loop: rounds of local work, each ended by one combination. Synchronous or federated, it is this loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter

import torch

from trainer import comm
from trainer.checkpoint import Checkpoints, Start
from trainer.cohort import Round
from trainer.contact import Contact, Wish
from trainer.evaluate import check_agreement, client_sums, exhibits, fingerprint
from trainer.local import Watch
from trainer.metrics import Metrics, Sink
from trainer.midround import Inside, restore, save_inside
from trainer.report import Tally, evaluation_metrics, round_metrics, validation_score
from trainer.run import Run
from trainer.state import State, Window
from trainer.work import Work

MOST_SKIPPED = 3  # windows of batches in a run


class Diverged(RuntimeError):
    """The numbers are of no use any more, and starting again would not mend them.

    Where leaving out batches would: `window`, the round's index and the step up to which, and those `skipped` before.
    """

    def __init__(self, message: str, window: tuple[int, int] | None = None, skipped: Sequence[Window] = ()):
        super().__init__(message)
        self.window, self.skipped = window, list(skipped)


class Preempted(Exception):
    """The run was told to leave, and has: all that it needs to go on is on disk, if it makes checkpoints."""


def fit(
    run: Run,
    sinks: Sequence[Sink] = (),
    checkpoints: Checkpoints | None = None,
    start: Start | None = None,
    watch: Watch | None = None,
    until: int | None = None,
    contact: Contact | None = None,
    diverged: Diverged | None = None,
) -> Metrics:
    """The result of a run: the figures of its last round and its totals, equal on every rank.

    Trains from the checkpoint `start`, or anew, to the end, or to `until` rounds. Every rank calls it; `sinks` and
    `watch` are rank 0's. `diverged` is what ended the last try: the batches of its window are left out, from `start`
    on. Raises Preempted when `contact` was told to leave, RuntimeError when replicas that must be equal are
    not, and Diverged when the numbers are of no use any more.
    """
    state = State(run, contact)
    inside = restore(state, start) if start else None
    if diverged:
        _skip(state, inside, diverged)
    while state.progress.rounds < (until or run.rounds) and not state.leaving:
        began = perf_counter() - (inside.seconds if inside else 0.0)
        round = run.round(state.progress.rounds)
        metrics = state.progress.trained or train_round(state, round, watch, checkpoints, inside)
        inside = None
        if metrics is not None:
            _end_round(state, metrics, began, sinks, checkpoints)
    state.trainer.vote.close()
    if checkpoints:
        checkpoints.wait()
    if state.leaving and state.progress.rounds < run.rounds:
        raise Preempted
    result = state.progress.result()
    if state.progress.rounds == run.rounds:
        shown = exhibits(state.trainer)
        for sink in sinks:
            sink.finish(result, shown)
    return result


def train_round(
    state: State,
    round: Round,
    watch: Watch | None = None,
    checkpoints: Checkpoints | None = None,
    inside: Inside | None = None,
) -> Metrics | None:
    """The figures of one round: this silo trains its clients of the cohort, then all silos combine.

    Goes on from the middle of the round, if `inside` is one. None when the run was told to leave before all silos had
    come to the end; each has then saved what it has done.
    """
    began = perf_counter() - (inside.seconds if inside else 0.0)
    if inside is None:
        state.run.algorithm.begin_round(round)
        inside = Inside(Tally(state.run, round, state.model.statistics))
    finished = _train_clients(state, round, inside, watch, checkpoints, began)
    state.local_fingerprint = fingerprint(state.model) if finished and state.run.evaluates(round.index) else 0
    metrics = combine(state, round, inside.tally, finished)
    if metrics is None:
        if finished and checkpoints:
            inside.seconds = perf_counter() - began
            save_inside(state, checkpoints, inside)
        return None
    seconds = perf_counter() - began
    return metrics | {"examples_per_second": metrics["round/examples"] / seconds, "seconds/round": seconds}


def _train_clients(
    state: State, round: Round, inside: Inside, watch: Watch | None, checkpoints: Checkpoints | None, began: float
) -> bool:
    """Whether this silo has trained all its clients of the round; if not, it was told to leave, and has saved."""
    run, trainer, tally = state.run, state.trainer, inside.tally

    def pause(work: Work, wish: Wish) -> bool:
        if not run.algorithm.votes and not torch.linalg.vector_norm(state.model.shared).isfinite():
            where = f"step {work.steps} of round {round.index + 1}"
            window = (round.index, work.steps)
            raise Diverged(f"The parameters are not finite after {where}", window, state.progress.skipped)
        if checkpoints:
            inside.work, inside.seconds = work, perf_counter() - began
            save_inside(state, checkpoints, inside)
        return wish is Wish.LEAVE

    clients = run.assignments(round)[run.topology.silo]
    trainer.skipped = [(first, last) for index, first, last in state.progress.skipped if index == round.index]
    for position in range(len(tally.works), len(clients)):
        client = clients[position]
        place = round.index + position / len(clients)
        watch_client = watch and _part(watch, place / run.rounds, 1 / (len(clients) * run.rounds))
        work = inside.work or trainer.begin(client)
        if not trainer.train(work, round, int(state.participations[client]), watch_client, pause):
            return False
        inside.work = None
        norm = run.algorithm.contribute(client, work.examples)
        if math.isfinite(norm):
            trainer.commit(client)
        tally.add(work, norm)
    return True


def _end_round(
    state: State, trained: Metrics, began: float, sinks: Sequence[Sink], checkpoints: Checkpoints | None
) -> None:
    """Evaluates, reports and saves; of a run that was told to leave before it evaluated, that is left for later."""
    run, index, progress = state.run, state.progress.rounds, state.progress
    progress.trained = trained
    _check_finite(state, trained)
    metrics = trained
    if run.evaluates(index):
        figures = None if state.leaving else evaluate(state)
        if figures is None:
            if checkpoints:
                state.save(checkpoints)
            return
        metrics = trained | figures
    stall = {"checkpoint/stall_seconds": checkpoints.take_stall()} if checkpoints else {}
    metrics = progress.advance(metrics | stall, perf_counter() - began)
    for sink in sinks:
        sink.record(metrics)
    if checkpoints and (run.saves(index) or state.leaving):
        state.save(checkpoints, is_best=progress.is_best(validation_score(run, metrics)))


def _skip(state: State, inside: Inside | None, diverged: Diverged) -> None:
    """Notes that the batches of a round are left out, from where the run goes on to where it diverged."""
    assert diverged.window
    if len(diverged.skipped) >= MOST_SKIPPED:
        raise Diverged(f"{diverged}, though the batches of {MOST_SKIPPED} windows are left out already")
    index, last = diverged.window
    first = inside.steps if inside and state.progress.rounds == index else 0
    state.progress.skipped = [*diverged.skipped, (index, first, last)]


def _check_finite(state: State, metrics: Metrics) -> None:
    """Raises Diverged, on every rank alike, when numbers that are not finite can no longer be left out."""
    run, progress = state.run, state.progress
    if not run.algorithm.votes and metrics["round/examples"] and not math.isfinite(metrics["train/loss"]):
        window = (progress.rounds, int(metrics["round/steps"]))
        raise Diverged(f"The loss of round {progress.rounds + 1} is not finite", window, progress.skipped)
    progress.bad_rounds = progress.bad_rounds + 1 if metrics["clients/left_out"] else 0
    if progress.bad_rounds >= run.max_bad_rounds:
        bad = {name for name, value in metrics.items() if name.endswith("/delta_norm") and not math.isfinite(value)}
        names = sorted(name.split("/")[1] for name in bad)
        raise Diverged(
            f"In {progress.bad_rounds} rounds in a row clients were left out, because their numbers are not finite; "
            f"this time {', '.join(names) or metrics['clients/left_out']}.\n"
            "  a smaller optimizer.lr, clip_norm=1, or a larger max_bad_rounds"
        )


def combine(state: State, round: Round, tally: Tally, finished: bool = True) -> Metrics | None:
    """The figures of a round, after the header's scalars and then the vectors have gone between the silos.

    The scalars go first: they say who is there, and what each silo's share of the whole is. None when a silo has not
    `finished` its work, because it was told to leave: then all leave.
    """
    algorithm = state.run.algorithm
    arrived = perf_counter()
    state.contact.at(f"round {round.index + 1}: combining with the other silos")
    # Every silo reaches this line, each round, those without clients too: it is a collective.
    own = algorithm.header() if state.run.topology.is_leader else dict.fromkeys(algorithm.header(), 0.0)
    presence = {"unfinished": float(not finished), "leaving": float(state.contact.wish() is Wish.LEAVE)}
    sums, tables = comm.sum_header({**own, **tally.scalars(), **presence}, tally.tables())
    state.leaving = sums["leaving"] > 0
    if sums["unfinished"]:
        return None
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


def evaluate(state: State) -> Metrics | None:
    """The figures of the validation and test sets, after a check that what must be equal is equal.

    None when a rank was told to leave on the way.
    """
    run, clients = state.run, state.run.clients
    began = perf_counter()
    state.contact.at(f"round {state.progress.rounds + 1}: evaluating")
    check_agreement(run.topology, state.local_fingerprint, state.model)
    tables = {"test": client_sums(state.trainer, run.data.test, clients.test)}
    if any(len(ids) for ids in clients.validation):
        tables["validation"] = client_sums(state.trainer, run.data.train, clients.validation)
    sums, tables = comm.sum_header({"leaving": float(state.contact.wish() is Wish.LEAVE)}, tables)
    state.leaving = sums["leaving"] > 0
    if state.leaving:
        return None
    metrics: Metrics = {}
    for name, table in tables.items():
        metrics |= evaluation_metrics(run, name, table)
    return metrics | {"seconds/evaluation": perf_counter() - began}


def _part(watch: Watch, start: float, length: float) -> Watch:
    """The watch of one client, whose round is the part [start, start + length) of the run."""
    return lambda done, examples, loss: watch(start + done * length, examples, loss)
