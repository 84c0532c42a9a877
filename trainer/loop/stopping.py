"""How a run may end before its last round, other than by a failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

BatchWindow = tuple[int, int, int]  # batches of a round: its index, the first step, the one after the last
StopReason = Literal["target", "patience", "seconds"]  # of Stop, why a run has ended


@dataclass(frozen=True)
class StopCriteria:
    """When a run is finished before its last round; what is None does not end it.

    metric_target         the value of the validation set's headline figure that is wanted, or a better one
    patience_evaluations  evaluations in a row that bring no better value
    max_training_seconds  evaluations excluded, over all starts; the round that is under way is done to its end
    """

    metric_target: float | None = None
    patience_evaluations: int | None = None
    max_training_seconds: float | None = None


class DivergedError(RuntimeError):
    """The numbers are of no use any more, and starting again would not mend them.

    Where leaving out batches would: `window`, the round's index and the step up to which, and those `skipped` before.
    """

    def __init__(self, message: str, window: tuple[int, int] | None = None, skipped: Sequence[BatchWindow] = ()):
        super().__init__(message)
        self.window, self.skipped = window, list(skipped)


class Preempted(Exception):
    """The run was told to leave, and has: all that it needs to go on is on disk, if it makes checkpoints."""
