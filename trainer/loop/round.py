"""One round: this silo trains its clients, then all silos combine. Synchronous or federated, it is this round."""

from __future__ import annotations

import math
from time import perf_counter

import torch

from trainer.algorithms.round import Round
from trainer.checkpoint import Checkpoints
from trainer.distributed import collectives
from trainer.loggers import Metrics
from trainer.loop.control import Wish
from trainer.loop.evaluate import fingerprint
from trainer.loop.local_trainer import ClientTraining, Watch
from trainer.loop.round_metrics import Tally, round_metrics
from trainer.loop.round_snapshot import Inside, save_inside
from trainer.loop.stopping import Diverged
from trainer.loop.train_state import State
from trainer.utils.compile import graphs_compiled


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
    seconds = state.run.length.deadline_seconds
    state.contact.finish_at = math.inf if seconds is None else began + seconds
    if state.run.stop.max_training_seconds is not None:
        state.contact.stop_at = began + state.run.stop.max_training_seconds - state.progress.training_seconds
    if inside is None:
        state.welcome(round)
        session = state.algorithm.start_round(round)
        inside = Inside(session, Tally(state.run, round, state.model.statistics))
    finished = _train_clients(state, round, inside, watch, checkpoints, began)
    state.contact.finish_at = math.inf
    state.trainer.vote.close()
    state.local_fingerprint = fingerprint(state.model) if finished and state.run.may_evaluate(round.index) else 0
    metrics = combine(state, round, inside, finished)
    if metrics is None:
        if finished and checkpoints:
            inside.seconds = perf_counter() - began
            save_inside(state, checkpoints, inside)
        return None
    seconds = perf_counter() - began
    if state.run.compile_backend:
        metrics["compile/graphs"] = graphs_compiled()
    return metrics | state.speed.figures(metrics, seconds) | {"seconds/round": seconds}


def _train_clients(
    state: State, round: Round, inside: Inside, watch: Watch | None, checkpoints: Checkpoints | None, began: float
) -> bool:
    """Whether this silo has trained all its clients of the round; if not, it was told to leave, and has saved."""
    run, trainer, tally = state.run, state.trainer, inside.tally

    def pause(client: ClientTraining, wish: Wish) -> bool:
        work = client.result
        if not run.algorithm.skips_nonfinite_clients and not torch.linalg.vector_norm(state.model.shared).isfinite():
            where = f"step {work.steps} of round {round.index + 1}"
            window = (round.index, work.steps)
            raise Diverged(f"The parameters are not finite after {where}", window, state.progress.skipped)
        if checkpoints:
            inside.client, inside.seconds = client, perf_counter() - began
            save_inside(state, checkpoints, inside)
        return wish is Wish.LEAVE

    clients = run.assignments(round)[run.topology.silo]
    trainer.skipped = [(first, last) for index, first, last in state.progress.skipped if index == round.index]
    alone = len(clients) == 1 and run.length.stragglers != "drop"
    for position in range(len(tally.works), len(clients)):
        if tally.works and tally.works[-1].is_last:
            tally.missing = len(clients) - position
            break
        client = clients[position]
        place = round.index + position / len(clients)
        watch_client = watch and _part(watch, place / run.rounds, 1 / (len(clients) * run.rounds))
        training = inside.client or trainer.begin(inside.session, client, alone)
        if not trainer.train(training, round, int(state.participations[client]), watch_client, pause):
            return False
        inside.client = None
        tally.add(training.result, _finish(state, training))
    return True


def _finish(state: State, training: ClientTraining) -> float | None:
    """The norm of the client's delta, now in this silo's sums; None of a client that was late and is dropped."""
    result = training.result
    if result.is_late and state.run.length.stragglers == "drop":
        return None
    if state.run.algorithm.skips_nonfinite_clients and not state.trainer.has_finite_statistics():
        return math.nan
    norm, kept = training.session.finish(result)
    if math.isfinite(norm):
        state.trainer.commit(result.client, kept)
    return norm


def combine(state: State, round: Round, inside: Inside, finished: bool = True) -> Metrics | None:
    """The figures of a round, after the header's scalars and then the vectors have gone between the silos.

    The scalars go first: they say who is there, and what each silo's share of the whole is. None when a silo has not
    `finished` its work, because it was told to leave: then all leave.
    """
    session, tally, arrived = inside.session, inside.tally, perf_counter()
    state.contact.at(f"round {round.index + 1}: combining with the other silos")
    # Every silo reaches this line, each round, those without clients too: it is a collective.
    scalars = session.scalars()
    own = scalars if state.run.topology.is_leader else dict.fromkeys(scalars, 0.0)
    presence = {"unfinished": float(not finished), "leaving": float(state.contact.wish() is Wish.LEAVE)}
    # The clocks differ: the first rank's decides for all.
    presence["out_of_time"] = float(state.run.topology.rank == 0 and arrived >= state.contact.stop_at)
    sums, tables = collectives.sum_header({**own, **tally.scalars(), **presence}, tally.tables())
    state.leaving = sums["leaving"] > 0
    if sums["unfinished"]:
        return None
    if sums["out_of_time"]:
        state.progress.stopped = "seconds"
    met = perf_counter()
    state.wire.begin_round(round.seed_for)
    figures = session.aggregate(sums)
    if round.index + 1 == state.run.rounds or state.progress.stopped:
        state.algorithm.flush()
    if sums["weight"] > 0:
        state.trainer.pool_statistics(tables["statistics"] / sums["trained_weight"], tally.counts)
        state.average_after_round()
    else:
        state.trainer.restore_statistics()
    state.participations[list(round.cohort)] += 1
    metrics = round_metrics(state.run, round, sums, tables) | figures
    metrics |= tally.seconds() | {
        "seconds/straggler_wait": met - arrived,
        "seconds/communication": perf_counter() - met,
    }
    return metrics | {
        "seconds/exposed_communication": state.stood_still(),
        "bytes_between_silos": state.wire.bytes_sent,
    }


def _part(watch: Watch, start: float, length: float) -> Watch:
    """The watch of one client, whose round is the part [start, start + length) of the run."""
    return lambda done, examples, loss: watch(start + done * length, examples, loss)
