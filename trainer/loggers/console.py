"""The rounds of a run for the person who waits for it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

from trainer.loggers import messages
from trainer.loggers.base import FinalArtifacts, Metrics
from trainer.loggers.terminal import PlainTerminal, Terminal


class ConsoleLogger:
    """A sink that prints one line a round and a summary at the end, with a progress bar on a terminal.

    rounds: how many the run has. folder: the run folder, named at the end. silos: this rank's silo is one of so many.
    terminal: whether the stream is one that can show a bar; None asks the stream.
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
        self._drawn = monotonic()

    def step(self, fraction_of_run: float, examples: int, loss: Callable[[], float]) -> None:
        """Count a step of this rank's silo, and show progress if it is due; meant to be called at every step.

        fraction_of_run: 0 to 1, over all rounds. loss: the step's mean loss, asked for only when it is shown.
        """
        self._examples += examples
        now = monotonic()
        if now < self._terminal.next_refresh:
            return
        rate = self._silos * self._examples / max(now - self._drawn, 1e-9)
        self._examples, self._drawn = 0, now
        text = messages.progress(fraction_of_run, rate, loss(), self._seconds_left(fraction_of_run))
        self._terminal.progress(fraction_of_run, text)

    def log_round(self, metrics: Metrics) -> None:
        self._terminal.line(*messages.round_line(metrics, self._rounds))

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        """Print the result, the run folder, and how to see its charts, in place of the bar."""
        self._terminal.close()
        for spans in messages.summary(result, self._folder):
            self._terminal.line(*spans)

    def close(self) -> None:
        self._terminal.close()

    def _seconds_left(self, fraction: float) -> float:
        """The time to the end at the pace since the first step, which a resumed run does not take at 0."""
        if self._start is None:
            self._start = (monotonic(), fraction)
        started, start = self._start
        return (monotonic() - started) * (1 - fraction) / (fraction - start) if fraction > start else math.inf


def make_terminal(stream: TextIO, is_terminal: bool | None = None) -> Terminal:
    """A screen that fits the stream; `is_terminal` says what it is, None asks it."""
    if is_terminal is None:
        is_terminal = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    if not is_terminal:
        return PlainTerminal(stream)
    from trainer.loggers.progress_bar import ProgressBarTerminal

    return ProgressBarTerminal(stream)
