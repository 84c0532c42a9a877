"""Ends of a run before its last round: criteria, divergence, preemption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic.dataclasses import dataclass

from trainer.utils.annotations import OPTIONS, PositiveInt, Seconds

BatchWindow = tuple[int, int, int]  # batches of a round: its index, the first step, and the step after the last
StopReason = Literal["target", "patience", "seconds"]  # the criterion by which a run has ended


@dataclass(frozen=True, config=OPTIONS)
class StopCriteria:
    """Criteria that finish a run before its last round; None does not.

    Attributes:
        metric_target: the monitored metric is this good, or better.
        patience_evaluations: consecutive evaluations without a better value.
        max_training_seconds: time of training over all starts, evaluations excluded; the current round is finished.
    """

    metric_target: float | None = None
    patience_evaluations: PositiveInt | None = None
    max_training_seconds: Seconds | None = None


class DivergedError(RuntimeError):
    """The numbers are not finite, and starting again would not mend that.

    Args:
        message: for the user.
        window: the index of the round and the step up to which leaving out batches may help; None if it cannot.
        skipped: the windows that were left out before.
    """

    def __init__(self, message: str, window: tuple[int, int] | None = None, skipped: Sequence[BatchWindow] = ()):
        super().__init__(message)
        self.window, self.skipped = window, list(skipped)


class LeftBehind(Exception):
    """The other silos went on without this one, which continues from their state. On every rank of the silo."""


class Preempted(Exception):
    """The run was asked to stop; all that is needed to resume is on disk, if it makes checkpoints."""
