"""One round: this silo trains its clients, then all silos combine. Synchronous or federated, it is this round."""

from __future__ import annotations

import math
from time import perf_counter

import torch

from trainer.algorithms.round import Round
from trainer.checkpoint import Checkpointer
from trainer.distributed import collectives
from trainer.loggers import Metrics
from trainer.loop.control import Action
from trainer.loop.evaluate import model_fingerprint
from trainer.loop.local_trainer import ClientTraining, StepCallback
from trainer.loop.round_metrics import RoundAccumulator, round_metrics
from trainer.loop.round_snapshot import RoundSnapshot, save_round_snapshot
from trainer.loop.stopping import DivergedError
from trainer.loop.train_state import TrainState
from trainer.utils.compile import count_compiled_graphs


def train_round(
    state: TrainState,
    round: Round,
    on_step: StepCallback | None = None,
    checkpointer: Checkpointer | None = None,
    snapshot: RoundSnapshot | None = None,
) -> Metrics | None:
    """The figures of one round: this silo trains its clients of the cohort, then all silos combine.

    Goes on from the middle of the round, if `snapshot` is one. None when the run was told to leave before all silos had
    come to the end; each has then saved what it has done.
    """
    began = perf_counter() - (snapshot.seconds if snapshot else 0.0)
    seconds = state.run.length.deadline_seconds
    state.control.round_deadline = math.inf if seconds is None else began + seconds
    if state.run.stop.max_training_seconds is not None:
        state.control.training_deadline = began + state.run.stop.max_training_seconds - state.progress.training_seconds
    if snapshot is None:
        state.init_new_clients(round)
        session = state.algorithm.start_round(round)
        snapshot = RoundSnapshot(session, RoundAccumulator(state.run, round, state.model.statistics))
    finished = _train_clients(state, round, snapshot, on_step, checkpointer, began)
    state.control.round_deadline = math.inf
    state.trainer.consensus.flush()
    state.local_fingerprint = model_fingerprint(state.model) if finished and state.run.may_evaluate(round.index) else 0
    metrics = aggregate_round(state, round, snapshot, finished)
    if metrics is None:
        if finished and checkpointer:
            snapshot.seconds = perf_counter() - began
            save_round_snapshot(state, checkpointer, snapshot)
        return None
    seconds = perf_counter() - began
    if state.run.compile_backend:
        metrics["compile/graphs"] = count_compiled_graphs()
    return metrics | state.throughput.metrics(metrics, seconds) | {"seconds/round": seconds}


def _train_clients(
    state: TrainState,
    round: Round,
    snapshot: RoundSnapshot,
    on_step: StepCallback | None,
    checkpointer: Checkpointer | None,
    began: float,
) -> bool:
    """Whether this silo has trained all its clients of the round; if not, it was told to leave, and has saved."""
    run, trainer, tally = state.run, state.trainer, snapshot.accumulator

    def pause(client: ClientTraining, action: Action) -> bool:
        work = client.result
        if not run.algorithm.skips_nonfinite_clients and not torch.linalg.vector_norm(state.model.shared).isfinite():
            where = f"step {work.steps} of round {round.index + 1}"
            window = (round.index, work.steps)
            raise DivergedError(f"The parameters are not finite after {where}", window, state.progress.skipped_windows)
        if checkpointer:
            snapshot.client, snapshot.seconds = client, perf_counter() - began
            save_round_snapshot(state, checkpointer, snapshot)
        return action is Action.STOP

    clients = run.assignments(round)[run.topology.silo]
    trainer.skipped_windows = [
        (first, last) for index, first, last in state.progress.skipped_windows if index == round.index
    ]
    alone = len(clients) == 1 and run.length.stragglers != "drop"
    for position in range(len(tally.results), len(clients)):
        if tally.results and tally.results[-1].ends_round:
            tally.not_started = len(clients) - position
            break
        client = clients[position]
        place = round.index + position / len(clients)
        watch_client = on_step and _rescale_progress(on_step, place / run.rounds, 1 / (len(clients) * run.rounds))
        training = snapshot.client or trainer.start_client(snapshot.session, client, alone)
        if not trainer.train(training, round, int(state.participations[client]), watch_client, pause):
            return False
        snapshot.client = None
        tally.add(training.result, _finish(state, training))
    return True


def _finish(state: TrainState, training: ClientTraining) -> float | None:
    """The norm of the client's delta, now in this silo's sums; None of a client that was late and is dropped."""
    result = training.result
    if result.timed_out and state.run.length.stragglers == "drop":
        return None
    if state.run.algorithm.skips_nonfinite_clients and not state.trainer.has_finite_statistics():
        return math.nan
    norm, kept = training.session.finish(result)
    if math.isfinite(norm):
        state.trainer.commit(result.client, kept)
    return norm


def aggregate_round(state: TrainState, round: Round, snapshot: RoundSnapshot, finished: bool = True) -> Metrics | None:
    """The figures of a round, after the header's scalars and then the vectors have gone between the silos.

    The scalars go first: they say who is there, and what each silo's share of the whole is. None when a silo has not
    `finished` its work, because it was told to leave: then all leave.
    """
    session, tally, arrived = snapshot.session, snapshot.accumulator, perf_counter()
    state.control.set_activity(f"round {round.index + 1}: combining with the other silos")
    # Every silo reaches this line, each round, those without clients too: it is a collective.
    scalars = session.scalars()
    own = scalars if state.run.topology.is_leader else dict.fromkeys(scalars, 0.0)
    presence = {"unfinished": float(not finished), "leaving": float(state.control.requested_action() is Action.STOP)}
    # The clocks differ: the first rank's decides for all.
    presence["out_of_time"] = float(state.run.topology.rank == 0 and arrived >= state.control.training_deadline)
    sums, tables = collectives.all_reduce_scalars({**own, **tally.scalars(), **presence}, tally.tables())
    state.is_stopping = sums["leaving"] > 0
    if sums["unfinished"]:
        return None
    if sums["out_of_time"]:
        state.progress.stopped = "seconds"
    met = perf_counter()
    state.transport.start_round(round.seed_for)
    figures = session.aggregate(sums)
    if round.index + 1 == state.run.rounds or state.progress.stopped:
        state.algorithm.flush()
    if sums["weight"] > 0:
        state.trainer.pool_statistics(tables["statistics"] / sums["trained_weight"], tally.counts)
        state.update_ema_after_round()
    else:
        state.trainer.restore_statistics()
    state.participations[list(round.cohort)] += 1
    metrics = round_metrics(state.run, round, sums, tables) | figures
    metrics |= tally.seconds() | {
        "seconds/straggler_wait": met - arrived,
        "seconds/communication": perf_counter() - met,
    }
    return metrics | {
        "seconds/exposed_communication": state.take_wait_seconds(),
        "bytes_between_silos": state.transport.bytes_sent,
    }


def _rescale_progress(on_step: StepCallback, start: float, length: float) -> StepCallback:
    """The watch of one client, whose round is the part [start, start + length) of the run."""
    return lambda done, examples, loss: on_step(start + done * length, examples, loss)
