"""The loop: rounds of local work, each ended by one combination. Synchronous or federated, it is this loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

from trainer.checkpoint import Checkpoints, Start
from trainer.distributed import collectives
from trainer.loggers import Metrics, Sink
from trainer.loop.control import Contact, Wish
from trainer.loop.evaluate import average_model, averaged_models, check_agreement, exhibits, judged_sums, tuned_models
from trainer.loop.local_trainer import Watch
from trainer.loop.micro_batch_size import settle_micro_batch
from trainer.loop.round import train_round
from trainer.loop.round_metrics import evaluation_metrics, score_of, validation_score
from trainer.loop.round_snapshot import Inside, restore
from trainer.loop.run import Run
from trainer.loop.stopping import Diverged, Preempted
from trainer.loop.train_state import Progress, State

MOST_SKIPPED = 3  # windows of batches in a run


def fit(
    run: Run,
    loggers: Sequence[Sink] = (),
    checkpoints: Checkpoints | None = None,
    start: Start | None = None,
    watch: Watch | None = None,
    until: int | None = None,
    contact: Contact | None = None,
    diverged: Diverged | None = None,
) -> dict[str, Any]:
    """The result of a run: the figures of its last round and its totals, equal on every rank.

    Trains from the checkpoint `start`, or anew, to the end, which may be that of `run.stop`, or to `until` rounds.
    Every rank calls it; `loggers` and `watch` are rank 0's. `diverged` is what ended the last try: the batches of its
    window are left out, from `start` on. Raises Preempted when `contact` was told to leave, RuntimeError when replicas
    that must be equal are not, and Diverged when the numbers are of no use any more.
    """
    state = State(run, contact)
    inside = restore(state, start) if start else None
    settle_micro_batch(state)
    if diverged:
        _skip(state, inside, diverged)
    while not state.progress.has_ended(until or run.rounds) and not state.leaving:
        began = perf_counter() - (inside.seconds if inside else 0.0)
        round = run.round(state.progress.rounds)
        metrics = state.progress.trained or train_round(state, round, watch, checkpoints, inside)
        inside = None
        if metrics is not None:
            _end_round(state, metrics, began, loggers, checkpoints)
    state.trainer.vote.close()
    if checkpoints:
        checkpoints.wait()
    if state.leaving and not state.progress.has_ended(run.rounds):
        raise Preempted
    result = state.progress.result()
    if state.progress.has_ended(run.rounds):
        shown = exhibits(state.trainer)
        for sink in loggers:
            sink.finish(result, shown)
    return result


def _end_round(
    state: State, trained: Metrics, began: float, loggers: Sequence[Sink], checkpoints: Checkpoints | None
) -> None:
    """Evaluates, reports and saves; of a run that was told to leave before it evaluated, that is left for later."""
    run, index, progress = state.run, state.progress.rounds, state.progress
    progress.trained = trained
    _check_finite(state, trained)
    metrics = trained
    if run.evaluates(index) or progress.stopped:
        figures = None if state.leaving else evaluate(state)
        if figures is None:
            if checkpoints:
                state.save(checkpoints)
            return
        metrics = trained | figures
    stall = {"checkpoint/stall_seconds": checkpoints.take_stall()} if checkpoints else {}
    metrics = progress.advance(metrics | stall, perf_counter() - began)
    score = validation_score(run, metrics)
    if score is not None:
        _decide(run, progress, score)
    for sink in loggers:
        sink.record(metrics)
    if checkpoints and (run.saves(index) or state.leaving or progress.stopped):
        state.save(checkpoints, is_best=progress.is_best(score))


def _decide(run: Run, progress: Progress, score: float) -> None:
    """Notes whether the run ends here, by a validation score: it is the same on all ranks, so they decide alike."""
    progress.note(score)
    if run.stop.metric_target is not None and score >= score_of(run, run.stop.metric_target):
        progress.stopped = "target"
    elif run.stop.patience_evaluations is not None and progress.in_vain >= run.stop.patience_evaluations:
        progress.stopped = "patience"


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
    if (
        not run.algorithm.skips_nonfinite_clients
        and metrics["round/examples"]
        and not math.isfinite(metrics["train/loss"])
    ):
        window = (progress.rounds, int(metrics["round/steps"]))
        raise Diverged(f"The loss of round {progress.rounds + 1} is not finite", window, progress.skipped)
    progress.bad_rounds = progress.bad_rounds + 1 if metrics["clients/nonfinite"] else 0
    if progress.bad_rounds >= run.max_nonfinite_rounds:
        bad = {name for name, value in metrics.items() if name.endswith("/delta_norm") and not math.isfinite(value)}
        names = sorted(name.split("/")[1] for name in bad)
        raise Diverged(
            f"In {progress.bad_rounds} rounds in a row clients were left out, because their numbers are not finite; "
            f"this time {', '.join(names) or metrics['clients/nonfinite']}.\n"
            "  a smaller optimizer.lr, clip.max_norm=1, or a larger max_nonfinite_rounds"
        )


def evaluate(state: State) -> Metrics | None:
    """The figures of the validation and test sets, after a check that what must be equal is equal.

    None when a rank was told to leave on the way.
    """
    run, clients = state.run, state.run.clients
    began = perf_counter()
    state.contact.at(f"round {state.progress.rounds + 1}: evaluating")
    check_agreement(run.topology, state.local_fingerprint, state.model)
    judged = {"test": judged_sums(state.trainer, run.data.test, clients.test)}
    if any(len(ids) for ids in clients.validation):
        judged["validation"] = judged_sums(state.trainer, run.data.train, clients.validation)
    if state.model.has_personal and state.model.has_shared:
        judged["global"] = judged_sums(state.trainer, run.data.test, clients.test, average_model)
    if state.average:
        averaged = partial(averaged_models, state.average)
        judged["ema"] = judged_sums(state.trainer, run.data.test, clients.test, averaged)
    if run.personal_steps:
        tuned = partial(tuned_models, run.round(state.progress.rounds))
        judged["personal"] = judged_sums(state.trainer, run.data.test, clients.test, tuned)
    tables = {f"{part}/{name}": table for part, own in judged.items() for name, table in own.items()}
    sums, tables = collectives.sum_header({"leaving": float(state.contact.wish() is Wish.LEAVE)}, tables)
    state.leaving = sums["leaving"] > 0
    if state.leaving:
        return None
    metrics: Metrics = {}
    for part, own in judged.items():
        metrics |= evaluation_metrics(run, part, {name: tables[f"{part}/{name}"] for name in own})
    return metrics | {"seconds/evaluation": perf_counter() - began}
