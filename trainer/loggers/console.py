"""The console: a line per round, a progress bar, and a summary."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

from trainer.loggers import messages
from trainer.loggers.base import FinalArtifacts, Metrics, TextSample
from trainer.loggers.terminal import make_terminal


class ConsoleLogger:
    """Logger that prints a line per round and a final summary, with a progress bar on a terminal.

    rounds: rounds of the run. folder: run folder, named in the summary. silos: number of silos.
    is_terminal: whether the stream can show a progress bar; None asks the stream.
    stream: standard output if None; never closed.
    """

    def __init__(
        self,
        rounds: int,
        folder: Path | None = None,
        silos: int = 1,
        is_terminal: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._rounds, self._folder, self._silos = rounds, folder, silos
        self._terminal = make_terminal(stream or sys.stdout, is_terminal)
        self._start: tuple[float, float] | None = None
        self._examples = 0
        self._last_refresh = monotonic()

    def step(self, fraction_of_run: float, examples: int, loss: Callable[[], float]) -> None:
        """Count an optimizer step and refresh the progress display if due. Cheap enough to call at every step.

        Args:
            fraction_of_run: progress over all rounds, 0 to 1.
            examples: examples of the step in this rank's silo; the displayed rate assumes equally fast silos.
            loss: returns the step's mean loss; called only when it is displayed, since it may wait for a GPU.
        """
        self._examples += examples
        now = monotonic()
        if now < self._terminal.next_refresh:
            return
        rate = self._silos * self._examples / max(now - self._last_refresh, 1e-9)
        self._examples, self._last_refresh = 0, now
        text = messages.progress(fraction_of_run, rate, loss(), self._seconds_left(fraction_of_run))
        self._terminal.progress(fraction_of_run, text)

    def log_round(self, metrics: Metrics) -> None:
        self._terminal.line(*messages.round_line(metrics, self._rounds))

    def log_samples(self, round: int, samples: Sequence[TextSample]) -> None:
        """Print a line per sample."""
        for sample in samples:
            self._terminal.line(*messages.sample_line(sample))

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        """Replace the progress bar by the result, the run folder, and the command that shows its charts."""
        self._terminal.close()
        for spans in messages.summary(result, self._folder):
            self._terminal.line(*spans)

    def close(self) -> None:
        self._terminal.close()

    def _seconds_left(self, fraction: float) -> float:
        """Estimate the remaining seconds from the pace since the first step; inf if unknown."""
        if self._start is None:
            self._start = (monotonic(), fraction)  # a resumed run does not start at 0
        start_time, start_fraction = self._start
        if fraction <= start_fraction:
            return math.inf
        return (monotonic() - start_time) * (1 - fraction) / (fraction - start_fraction)
