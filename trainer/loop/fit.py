"""The training loop: rounds of local training, each ended by one combination, synchronous or federated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import nn

from trainer.checkpoint import Checkpointer, ResumePoint
from trainer.distributed import collectives
from trainer.loggers import Logger, Metrics, TextLogger, TextSample
from trainer.loop.artifacts import make_artifacts
from trainer.loop.checkpointing import resume, save_round_checkpoint
from trainer.loop.control import LoopControl
from trainer.loop.evaluate import evaluate
from trainer.loop.exchange import ExchangeFactory, InWorld
from trainer.loop.local_trainer import StepCallback
from trainer.loop.micro_batch_size import find_micro_batch_size
from trainer.loop.monitor import best_round, monitored_score, score_of
from trainer.loop.progress import Progress
from trainer.loop.round import train_round
from trainer.loop.round_snapshot import RoundSnapshot
from trainer.loop.run import Run
from trainer.loop.step_metrics import StepMetrics
from trainer.loop.stopping import DivergedError, Preempted
from trainer.loop.text_samples import write_samples
from trainer.loop.train_state import TrainState

MAX_SKIPPED = 3  # windows of batches in a run


@dataclass(frozen=True)
class Result:
    """The outcome of a run: the metrics of its last round and the totals, and the trained model of this rank."""

    metrics: dict[str, Any]
    model: nn.Module


def fit(
    run: Run,
    loggers: Sequence[Logger] = (),
    checkpointer: Checkpointer | None = None,
    resume_point: ResumePoint | None = None,
    on_step: StepCallback | None = None,
    on_start: Callable[[TrainState], None] | None = None,
    until: int | None = None,
    control: LoopControl | None = None,
    diverged: DivergedError | None = None,
    on_end: Callable[[Result], None] | None = None,
    make_exchange: ExchangeFactory = InWorld,
) -> Result:
    """Train a run to its end. Every rank calls it. The run stays as it is: another call trains another model.

    Args:
        run: the choices.
        loggers: get the metrics of each round; on rank 0 alone.
        checkpointer: saves the state; None: nothing is saved.
        resume_point: the checkpoint to continue from; None: the run begins.
        on_step: is called after each step; on rank 0 alone.
        on_start: is called before the first step.
        until: the number of rounds after which to return, if that is before the end.
        control: what this process is asked to do.
        diverged: what ended the last attempt; the batches of its window are left out, from `resume_point` on.
        on_end: is called with the result at the end of the last round, once its checkpoint is complete.
        make_exchange: makes what brings the silos together.

    Returns:
        The metrics, equal on every rank, and the trained model.

    Raises:
        LeftBehind: the other silos went on without this one: another call continues from their state.
        Preempted: `control` was asked to stop, and all that is needed to resume is saved.
        DivergedError: the numbers are not finite, and nothing that can be left out mends it.
        RuntimeError: replicas that must be equal are not.
    """
    state = TrainState(run, control, make_exchange)
    with closing(state.trainer.reader):
        if on_start:
            on_start(state)
        snapshot = resume(state, resume_point)
        find_micro_batch_size(state)
        on_step = _with_step_metrics(state, loggers, on_step, snapshot)
        if diverged:
            _skip_batches(state, snapshot, diverged)
        while not state.progress.has_ended(until or run.rounds) and not state.is_stopping:
            began = perf_counter() - (snapshot.seconds if snapshot else 0.0)
            round = run.sample_round(state.progress.rounds)
            metrics = state.progress.unevaluated_metrics or train_round(state, round, on_step, checkpointer, snapshot)
            snapshot = None
            if metrics is not None:
                _end_round(state, metrics, began, loggers, checkpointer)
        state.trainer.consensus.flush()
        if checkpointer:
            checkpointer.wait()
        if state.is_stopping and not state.progress.has_ended(run.rounds):
            raise Preempted
        result = Result(state.progress.result() | best_round(run, state.progress), state.model.module)
        if state.progress.has_ended(run.rounds):
            if on_end:  # before all that may still fail: what others have written for artifacts and loggers
                collectives.barrier()  # the last checkpoint is complete when all ranks have written their parts
                on_end(result)
            artifacts = make_artifacts(state)
            for logger in loggers:
                logger.finalize(result.metrics, artifacts)
        return result


def _with_step_metrics(
    state: TrainState, loggers: Sequence[Logger], on_step: StepCallback | None, snapshot: RoundSnapshot | None
) -> StepCallback | None:
    """Return the callback of a step that logs it too, if the run wants that and this rank logs."""
    every = state.run.metrics.every_steps
    if every is None or not loggers:
        return on_step
    log, then = StepMetrics(state, loggers, every, snapshot.steps if snapshot else 0), on_step
    if then is None:
        return log

    def both(done: float, examples: int, loss: Callable[[], float]) -> None:
        log(done, examples, loss)
        then(done, examples, loss)

    return both


def _end_round(
    state: TrainState, trained: Metrics, began: float, loggers: Sequence[Logger], checkpointer: Checkpointer | None
) -> None:
    """Evaluate, log and save a round; if the run is asked to stop before it has evaluated, do that after the resume."""
    run, index, progress = state.run, state.progress.rounds, state.progress
    progress.unevaluated_metrics = trained
    _check_finite(state, trained)
    metrics: Metrics = trained
    samples: list[TextSample] = []
    if run.evaluates(index) or progress.stopped:
        evaluation = None if state.is_stopping else evaluate(state)
        if evaluation is None:
            if checkpointer:
                save_round_checkpoint(state, checkpointer)
            return
        metrics = trained | evaluation
        samples = write_samples(state)
    stall = {"checkpoint/stall_seconds": checkpointer.take_stall_seconds()} if checkpointer else {}
    metrics = progress.advance(metrics | stall, perf_counter() - began)
    score = monitored_score(run, metrics)
    if score is not None:
        _check_stop_criteria(run, progress, score)
    for logger in loggers:
        logger.log_round(metrics)
        if samples and isinstance(logger, TextLogger):
            logger.log_samples(progress.rounds, samples)
    if checkpointer and (run.saves(index) or state.is_stopping or progress.stopped):
        save_round_checkpoint(state, checkpointer, is_best=progress.update_best(score))


def _check_stop_criteria(run: Run, progress: Progress, score: float) -> None:
    """Decide whether the run ends here, by a score that is the same on all ranks."""
    progress.record_score(score)
    if run.stop.metric_target is not None and score >= score_of(run, run.stop.metric_target):
        progress.stopped = "target"
    elif (
        run.stop.patience_evaluations is not None
        and progress.evaluations_without_improvement >= run.stop.patience_evaluations
    ):
        progress.stopped = "patience"


def _skip_batches(state: TrainState, snapshot: RoundSnapshot | None, diverged: DivergedError) -> None:
    """Leave out the batches of a round, from where the run resumes to where it diverged."""
    assert diverged.window
    if len(diverged.skipped) >= MAX_SKIPPED:
        raise DivergedError(f"{diverged}, though the batches of {MAX_SKIPPED} windows are left out already")
    index, last = diverged.window
    first = snapshot.steps if snapshot and state.progress.rounds == index else 0
    state.progress.skipped_windows = [*diverged.skipped, (index, first, last)]


def _check_finite(state: TrainState, metrics: Metrics) -> None:
    """Raise DivergedError, on every rank alike, when numbers that are not finite can no longer be left out."""
    run, progress = state.run, state.progress
    if (
        not run.algorithm.skips_nonfinite_clients
        and metrics["round/examples"]
        and not math.isfinite(metrics["train/loss"])
    ):
        window = (progress.rounds, int(metrics["round/steps"]))
        raise DivergedError(f"The loss of round {progress.rounds + 1} is not finite", window, progress.skipped_windows)
    progress.nonfinite_rounds = progress.nonfinite_rounds + 1 if metrics["clients/nonfinite"] else 0
    if progress.nonfinite_rounds >= run.training.max_nonfinite_rounds:
        bad = {name for name, value in metrics.items() if name.endswith("/delta_norm") and not math.isfinite(value)}
        names = sorted(name.split("/")[1] for name in bad)
        raise DivergedError(
            f"In {progress.nonfinite_rounds} rounds in a row clients were left out, because their numbers are not "
            f"finite; this time {', '.join(names) or metrics['clients/nonfinite']}.\n"
            "  a smaller optimizer.lr, clip.max_norm=1, or a larger max_nonfinite_rounds"
        )
