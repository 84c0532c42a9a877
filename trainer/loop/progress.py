"""The progress of a run: what is counted, and what decides when it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trainer.loggers import Metrics
from trainer.loop.stopping import BatchWindow, StopReason


@dataclass
class Progress:
    """How far a run has come; equal on all ranks.

    Attributes:
        metrics: of the last round.
        unevaluated_metrics: of a round that is trained and combined, but not yet evaluated.
        nonfinite_rounds: consecutive rounds in which a client was left out.
        best_saved_score: the best score of a round that was saved, see loop/monitor.py.
        best_saved_round: the number of that round.
        best_score: the best score.
        evaluations_without_improvement: consecutive evaluations without a better score.
        micro_batch_size: the largest that fits, if it was searched for.
        stopped: the reason why the run ends with the last trained round, before all its rounds.
        skipped_windows: windows of batches that are left out.
        silo_sizes: the number of ranks in each silo.
        silo_dims: the ranks over which a silo shards the model, and those over which it divides layers.
        threads: the number of CPU threads of each rank, by which sums are divided.
    """

    rounds: int = 0
    examples: int = 0
    steps: int = 0
    units: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    unevaluated_metrics: Metrics | None = None
    nonfinite_rounds: int = 0
    best_saved_score: float | None = None
    best_saved_round: int | None = None
    best_score: float | None = None
    evaluations_without_improvement: int = 0
    micro_batch_size: int | None = None
    stopped: StopReason | None = None
    skipped_windows: list[BatchWindow] = field(default_factory=list)
    silo_sizes: list[int] = field(default_factory=list)
    silo_dims: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def advance(self, metrics: Metrics, seconds: float) -> Metrics:
        """Count one round.

        Args:
            metrics: of the round and its evaluation.
            seconds: of both.

        Returns:
            The metrics with the totals so far.
        """
        self.rounds += 1
        self.examples += int(metrics["round/examples"])
        self.steps += int(metrics["round/steps"])
        self.units += int(metrics["round/units"])
        self.seconds += seconds
        self.training_seconds += metrics["seconds/round"]
        totals = {"round": self.rounds, "examples": self.examples, "steps": self.steps, "seconds": self.seconds}
        if self.micro_batch_size:
            totals["micro_batch_size"] = self.micro_batch_size
        self.metrics = totals | metrics
        self.unevaluated_metrics = None
        return self.metrics

    def update_best(self, score: float | None) -> bool:
        """Return whether the last round's score, of which more is better, is the best so far; remember it if so."""
        if score is None or not math.isfinite(score):
            return False
        if self.best_saved_score is not None and score <= self.best_saved_score:
            return False
        self.best_saved_score, self.best_saved_round = score, self.rounds
        return True

    def has_ended(self, rounds: int) -> bool:
        """Return whether there is nothing more to train or to evaluate, in a run of this number of rounds."""
        return self.rounds >= rounds or (self.stopped is not None and self.unevaluated_metrics is None)

    def record_score(self, score: float) -> None:
        """Count an evaluation with this score, of which more is better."""
        is_better = math.isfinite(score) and (self.best_score is None or score > self.best_score)
        self.best_score = score if is_better else self.best_score
        self.evaluations_without_improvement = 0 if is_better else self.evaluations_without_improvement + 1

    def result(self) -> dict[str, Any]:
        """Return the last round's metrics, without single clients, and the rates over all rounds.

        `stopped` is among them if the run ended before all its rounds.
        """
        hidden = ("client/", "slowest/", "seconds/", "delta/", "round/")
        result = {name: value for name, value in self.metrics.items() if not name.startswith(hidden)}
        done = {"examples_per_second": self.examples, "tokens_per_second": self.units}
        result |= {name: count / max(self.training_seconds, 1e-9) for name, count in done.items() if name in result}
        return result | ({"stopped": self.stopped} if self.stopped else {})
