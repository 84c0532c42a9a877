"""The loop: rounds of local work, each ended by one combination. Synchronous or federated, it is this loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

from trainer.checkpoint import Checkpointer, ResumePoint
from trainer.distributed import collectives
from trainer.loggers import Logger, Metrics
from trainer.loop.control import Action, LoopControl
from trainer.loop.evaluate import (
    averaged_personal_model,
    check_consistency,
    ema_models,
    evaluation_sums,
    finetuned_models,
    make_artifacts,
)
from trainer.loop.local_trainer import StepCallback
from trainer.loop.micro_batch_size import find_micro_batch_size
from trainer.loop.round import train_round
from trainer.loop.round_metrics import evaluation_metrics, score_of, validation_score
from trainer.loop.round_snapshot import RoundSnapshot, restore
from trainer.loop.run import Run
from trainer.loop.stopping import DivergedError, Preempted
from trainer.loop.train_state import Progress, TrainState

MAX_SKIPPED = 3  # windows of batches in a run


def fit(
    run: Run,
    loggers: Sequence[Logger] = (),
    checkpointer: Checkpointer | None = None,
    resume_point: ResumePoint | None = None,
    on_step: StepCallback | None = None,
    until: int | None = None,
    control: LoopControl | None = None,
    diverged: DivergedError | None = None,
) -> dict[str, Any]:
    """The result of a run: the figures of its last round and its totals, equal on every rank.

    Trains from the checkpoint `resume_point`, or anew, to the end, which may be that of `run.stop`, or to `until` rounds.
    Every rank calls it; `loggers` and `on_step` are rank 0's. `diverged` is what ended the last try: the batches of its
    window are left out, from `resume_point` on. Raises Preempted when `control` was told to leave, RuntimeError when replicas
    that must be equal are not, and Diverged when the numbers are of no use any more.
    """
    state = TrainState(run, control)
    inside = restore(state, resume_point) if resume_point else None
    find_micro_batch_size(state)
    if diverged:
        _skip_batches(state, inside, diverged)
    while not state.progress.has_ended(until or run.rounds) and not state.is_stopping:
        began = perf_counter() - (inside.seconds if inside else 0.0)
        round = run.round(state.progress.rounds)
        metrics = state.progress.unevaluated_metrics or train_round(state, round, on_step, checkpointer, inside)
        inside = None
        if metrics is not None:
            _end_round(state, metrics, began, loggers, checkpointer)
    state.trainer.consensus.flush()
    if checkpointer:
        checkpointer.wait()
    if state.is_stopping and not state.progress.has_ended(run.rounds):
        raise Preempted
    result = state.progress.result()
    if state.progress.has_ended(run.rounds):
        shown = make_artifacts(state.trainer)
        for sink in loggers:
            sink.finalize(result, shown)
    return result


def _end_round(
    state: TrainState, trained: Metrics, began: float, loggers: Sequence[Logger], checkpointer: Checkpointer | None
) -> None:
    """Evaluates, reports and saves; of a run that was told to leave before it evaluated, that is left for later."""
    run, index, progress = state.run, state.progress.rounds, state.progress
    progress.unevaluated_metrics = trained
    _check_finite(state, trained)
    metrics = trained
    if run.evaluates(index) or progress.stopped:
        figures = None if state.is_stopping else evaluate(state)
        if figures is None:
            if checkpointer:
                state.save(checkpointer)
            return
        metrics = trained | figures
    stall = {"checkpoint/stall_seconds": checkpointer.take_stall_seconds()} if checkpointer else {}
    metrics = progress.advance(metrics | stall, perf_counter() - began)
    score = validation_score(run, metrics)
    if score is not None:
        _check_stop_criteria(run, progress, score)
    for sink in loggers:
        sink.log_round(metrics)
    if checkpointer and (run.saves(index) or state.is_stopping or progress.stopped):
        state.save(checkpointer, is_best=progress.update_best(score))


def _check_stop_criteria(run: Run, progress: Progress, score: float) -> None:
    """Notes whether the run ends here, by a validation score: it is the same on all ranks, so they decide alike."""
    progress.record_score(score)
    if run.stop.metric_target is not None and score >= score_of(run, run.stop.metric_target):
        progress.stopped = "target"
    elif (
        run.stop.patience_evaluations is not None
        and progress.evaluations_without_improvement >= run.stop.patience_evaluations
    ):
        progress.stopped = "patience"


def _skip_batches(state: TrainState, snapshot: RoundSnapshot | None, diverged: DivergedError) -> None:
    """Notes that the batches of a round are left out, from where the run goes on to where it diverged."""
    assert diverged.window
    if len(diverged.skipped) >= MAX_SKIPPED:
        raise DivergedError(f"{diverged}, though the batches of {MAX_SKIPPED} windows are left out already")
    index, last = diverged.window
    first = snapshot.steps if snapshot and state.progress.rounds == index else 0
    state.progress.skipped_windows = [*diverged.skipped, (index, first, last)]


def _check_finite(state: TrainState, metrics: Metrics) -> None:
    """Raises Diverged, on every rank alike, when numbers that are not finite can no longer be left out."""
    run, progress = state.run, state.progress
    if (
        not run.algorithm.skips_nonfinite_clients
        and metrics["round/examples"]
        and not math.isfinite(metrics["train/loss"])
    ):
        window = (progress.rounds, int(metrics["round/steps"]))
        raise DivergedError(f"The loss of round {progress.rounds + 1} is not finite", window, progress.skipped_windows)
    progress.nonfinite_rounds = progress.nonfinite_rounds + 1 if metrics["clients/nonfinite"] else 0
    if progress.nonfinite_rounds >= run.max_nonfinite_rounds:
        bad = {name for name, value in metrics.items() if name.endswith("/delta_norm") and not math.isfinite(value)}
        names = sorted(name.split("/")[1] for name in bad)
        raise DivergedError(
            f"In {progress.nonfinite_rounds} rounds in a row clients were left out, because their numbers are not finite; "
            f"this time {', '.join(names) or metrics['clients/nonfinite']}.\n"
            "  a smaller optimizer.lr, clip.max_norm=1, or a larger max_nonfinite_rounds"
        )


def evaluate(state: TrainState) -> Metrics | None:
    """The figures of the validation and test sets, after a check that what must be equal is equal.

    None when a rank was told to leave on the way.
    """
    run, clients = state.run, state.run.clients
    began = perf_counter()
    state.control.set_activity(f"round {state.progress.rounds + 1}: evaluating")
    check_consistency(run.topology, state.local_fingerprint, state.model)
    judged = {"test": evaluation_sums(state.trainer, run.data.test, clients.test)}
    if any(len(ids) for ids in clients.validation):
        judged["validation"] = evaluation_sums(state.trainer, run.data.train, clients.validation)
    if state.model.has_personal and state.model.has_shared:
        judged["global"] = evaluation_sums(state.trainer, run.data.test, clients.test, averaged_personal_model)
    if state.ema:
        averaged = partial(ema_models, state.ema)
        judged["ema"] = evaluation_sums(state.trainer, run.data.test, clients.test, averaged)
    if run.personal_steps:
        tuned = partial(finetuned_models, run.round(state.progress.rounds))
        judged["personal"] = evaluation_sums(state.trainer, run.data.test, clients.test, tuned)
    tables = {f"{part}/{name}": table for part, own in judged.items() for name, table in own.items()}
    sums, tables = collectives.all_reduce_scalars(
        {"leaving": float(state.control.requested_action() is Action.STOP)}, tables
    )
    state.is_stopping = sums["leaving"] > 0
    if state.is_stopping:
        return None
    metrics: Metrics = {}
    for part, own in judged.items():
        metrics |= evaluation_metrics(run, part, {name: tables[f"{part}/{name}"] for name in own})
    return metrics | {"seconds/evaluation": perf_counter() - began}
