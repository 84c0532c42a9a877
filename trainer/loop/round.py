"""One round: the silo trains its clients, then all silos combine, synchronous or federated."""

from __future__ import annotations

import logging
import math
from time import perf_counter

import torch

from trainer.algorithms.round import Round
from trainer.checkpoint import Checkpointer
from trainer.loggers import Metrics
from trainer.loop.checkpointing import save_round_snapshot
from trainer.loop.consistency import model_fingerprint
from trainer.loop.control import Action
from trainer.loop.exchange import UNFINISHED
from trainer.loop.local_trainer import ClientTraining, StepCallback
from trainer.loop.round_metrics import RoundAccumulator, round_metrics
from trainer.loop.round_snapshot import RoundSnapshot
from trainer.loop.stopping import DivergedError
from trainer.loop.train_state import TrainState
from trainer.utils.compile import count_compiled_graphs
from trainer.utils.errors import InputError
from trainer.utils.text import first_few

log = logging.getLogger(__name__)

CLIENTS_LOGGED = 10  # of a round, by their numbers


def train_round(
    state: TrainState,
    round: Round,
    on_step: StepCallback | None = None,
    checkpointer: Checkpointer | None = None,
    snapshot: RoundSnapshot | None = None,
) -> Metrics | None:
    """Train this silo's clients of a round, then combine with the other silos.

    Args:
        state: the state.
        round: the round.
        on_step: is called after each step.
        checkpointer: saves the middle of the round when asked to.
        snapshot: the middle of the round to continue from; None: the round begins.

    Returns:
        The metrics of the round; None if the run was asked to stop before all silos had finished, and each has saved
        what it has done.
    """
    began = perf_counter() - (snapshot.seconds if snapshot else 0.0)
    seconds = state.run.round.deadline_seconds
    state.control.round_deadline = math.inf if seconds is None else began + seconds
    if state.run.stop.max_training_seconds is not None:
        state.control.training_deadline = began + state.run.stop.max_training_seconds - state.progress.training_seconds
    if snapshot is None:
        state.init_new_clients(round)
        session = state.algorithm.start_round(round)
        snapshot = RoundSnapshot(session, RoundAccumulator(state.run, round, state.model.statistics))
    finished = _train_clients(state, round, snapshot, on_step, checkpointer, began)
    _check_trained(state, round)
    state.control.round_deadline = math.inf
    state.trainer.consensus.flush()
    state.local_fingerprint = model_fingerprint(state.model) if finished and state.run.may_evaluate(round.index) else 0
    metrics = aggregate_round(state, round, snapshot, finished)
    if metrics is None:
        if finished and checkpointer:
            snapshot.seconds = perf_counter() - began
            save_round_snapshot(state, checkpointer, snapshot)
        return None
    state.prepare_new_clients()
    seconds = perf_counter() - began
    _log_round(state, round, snapshot, seconds)
    if state.run.training.compile_backend:
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
    """Train this silo's clients; return whether all have finished. Otherwise it was asked to stop, and has saved."""
    run, trainer, accumulator = state.run, state.trainer, snapshot.accumulator

    def on_action(client: ClientTraining, action: Action) -> bool:
        steps = client.result.steps
        if not run.algorithm.skips_nonfinite_clients and not math.isfinite(_parameter_norm(state)):
            where = f"step {steps} of round {round.index + 1}"
            window = (round.index, steps)
            raise DivergedError(f"The parameters are not finite after {where}", window, state.progress.skipped_windows)
        if checkpointer:
            snapshot.client, snapshot.seconds = client, perf_counter() - began
            save_round_snapshot(state, checkpointer, snapshot)
        return action is Action.STOP

    clients = run.assignments(round)[run.topology.silo]
    trainer.skipped_windows = [
        (first, last) for index, first, last in state.progress.skipped_windows if index == round.index
    ]
    exclusive = len(clients) == 1 and run.round.stragglers != "drop"
    for position in range(len(accumulator.results), len(clients)):
        if accumulator.results and accumulator.results[-1].ends_round:
            accumulator.not_started = len(clients) - position
            break
        client = clients[position]
        begins_at = round.index + position / len(clients)
        on_client_step = on_step and _rescale_progress(on_step, begins_at / run.rounds, 1 / (len(clients) * run.rounds))
        training = snapshot.client or trainer.start_client(snapshot.session, client, exclusive)
        if not trainer.train(training, round, int(state.participations[client]), on_client_step, on_action):
            return False
        snapshot.client = None
        accumulator.add(training.result, _finish(state, training))
    return True


def _parameter_norm(state: TrainState) -> float:
    """Return the 2-norm of the shared parameters of the model. A collective of the parts of a copy."""
    return state.transport.norm_over_parts(float(torch.linalg.vector_norm(state.model.shared)))


def _log_round(state: TrainState, round: Round, snapshot: RoundSnapshot, seconds: float) -> None:
    """Log what this rank has done in a round that is combined."""
    results = snapshot.accumulator.results
    clients = ", ".join(first_few((result.client for result in results), CLIENTS_LOGGED)) or "none"
    log.info(
        "round %d of %d in %.3f s: trained clients: %s; steps: %d, examples: %d",
        *(round.index + 1, state.run.rounds, seconds, clients),
        *(snapshot.steps, sum(result.examples_seen for result in results)),
    )


def _check_trained(state: TrainState, round: Round) -> None:
    """Raise InputError if the model has thawed or added parameters."""
    if names := state.model.untrained_parameters():
        raise InputError(
            f"model= has parameters that began to require gradients in round {round.index + 1}: {', '.join(names)}.\n"
            "They are not trained: the parameters to train are those that require gradients when the run begins.\n"
            "  let them require gradients from the start, or train in two runs, the second from model.init="
        )


def _finish(state: TrainState, training: ClientTraining) -> float | None:
    """Add a trained client to the silo's sums; return the norm of its update, None if it was late and is dropped."""
    result = training.result
    if result.timed_out and state.run.round.stragglers == "drop":
        return None
    if state.run.algorithm.skips_nonfinite_clients and not state.trainer.statistics.are_finite():
        return math.nan
    norm, kept = training.session.finish(result)
    if math.isfinite(norm):
        state.trainer.commit(result.client, kept)
    return norm


def aggregate_round(state: TrainState, round: Round, snapshot: RoundSnapshot, finished: bool = True) -> Metrics | None:
    """Combine a round with the other silos. A collective, which every silo reaches each round, with clients or without.

    Args:
        state: the state.
        round: the round.
        snapshot: what this silo has done of it.
        finished: whether that is all its work; otherwise it was asked to stop.

    Returns:
        The metrics of the round; None if a silo has not finished: then all stop.
    """
    session, accumulator, arrived = snapshot.session, snapshot.accumulator, perf_counter()
    state.control.set_activity(f"round {round.index + 1}: combining with the other silos")
    scalars = session.scalars()
    scalars = scalars if state.run.topology.is_leader else dict.fromkeys(scalars, 0.0)
    scalars |= accumulator.scalars()
    scalars |= {UNFINISHED: float(not finished), "stopping": float(state.control.requested_action() is Action.STOP)}
    # The clocks differ: the first rank's decides for all.
    scalars["out_of_time"] = float(state.run.topology.rank == 0 and arrived >= state.control.training_deadline)
    combined = state.exchange.combine(state.algorithm, session, round, scalars, accumulator.tables())
    sums, tables = combined.sums, combined.tables
    state.is_stopping = sums["stopping"] > 0
    if combined.metrics is None:
        return None
    if sums["out_of_time"]:
        state.progress.stopped = "seconds"
    if round.index + 1 == state.run.rounds or state.progress.stopped:
        state.algorithm.flush()
    if sums["weight"] > 0:
        state.trainer.statistics.pool(tables["statistics"] / sums["trained_weight"], tables["counts"].amax(0).long())
        state.update_ema_after_round()
    else:
        state.trainer.statistics.reset_model()
    state.participations[list(round.cohort)] += 1
    metrics = round_metrics(state.run, round, sums, tables) | combined.metrics | accumulator.seconds()
    return metrics | {
        "seconds/straggler_wait": combined.met - arrived,
        "seconds/communication": perf_counter() - combined.met,
        "seconds/exposed_communication": state.take_wait_seconds(),
        "bytes_between_silos": state.transport.bytes_sent,
    }


def _rescale_progress(on_step: StepCallback, start: float, length: float) -> StepCallback:
    """Return the callback of one client, whose round is the part [start, start + length) of the run."""
    return lambda done, examples, loss: on_step(start + done * length, examples, loss)
