"""What every metric sink can do: take a round, take the end of the run, close."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # reading a metrics file should not wait seconds for torch
    from torch import Tensor

Metrics = dict[str, float | int]


@dataclass(frozen=True)
class FinalArtifacts:
    """What a finished run shows besides numbers.

    confusion: counts of the test set, int64 [classes, classes], rows are the truth and columns the prediction.
    label_names: one name a class, in the order of the classes; empty means their numbers.
    sample: text that a language model has written.
    """

    confusion: Tensor | None = None
    label_names: tuple[str, ...] = ()
    sample: str = ""


class Logger(Protocol):
    """A place where rank 0 sends the metrics. The other ranks have none."""

    def log_round(self, metrics: Metrics) -> None:
        """Take the metrics of one round, keys such as `round`, `train/loss`, `client/3/test_accuracy`.

        `round` is the number of rounds done, 1 after the first. Keys of what was not measured in this round are absent.
        """
        ...

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        """Take the result of the whole run; a run that crashes or is preempted never gets here."""
        ...

    def close(self) -> None:
        """Release files and the terminal; always called, twice is allowed."""
        ...
