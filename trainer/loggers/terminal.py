"""Terminals that the console writes to: plain lines in a log, or a progress bar below lines that scroll."""

from __future__ import annotations

import os
import sys
from time import monotonic
from typing import TextIO

from trainer.loggers.messages import Span

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REFRESHES = 0.5


class Terminal:
    """A stream with permanent lines and progress. In a log there are no styles, and progress is a line like any other.

    Attributes:
        next_refresh: earliest time.monotonic() at which an update of the progress is worthwhile. In a log that is 10
            seconds after the last line.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.next_refresh = 0.0

    def line(self, *spans: Span) -> None:
        """Print a line."""
        text = "".join(span if isinstance(span, str) else span[0] for span in spans)
        print(text.rstrip(), file=self._stream, flush=True)
        self.next_refresh = monotonic() + SECONDS_BETWEEN_LINES

    def progress(self, fraction: float, text: str) -> None:
        """Display the fraction done, 0 to 1, and schedule the next refresh."""
        self.line(text)

    def close(self) -> None:
        """Remove the progress display. The stream stays open, and further lines may follow."""


class ProgressBarTerminal(Terminal):
    """Terminal with a progress bar in the last row, redrawn at most twice a second."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console  # not imported when the output is a log
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        super().__init__(stream)
        is_stdout = stream is sys.stdout
        self._progress = Progress(
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.description}", style="default", markup=False),
            console=Console(file=stream, force_terminal=True, force_interactive=True),
            auto_refresh=False,  # a refresh thread would compete with training for the interpreter lock
            transient=True,
            expand=True,
            # Prints of other code appear above the bar, unless they go to another stream than this terminal.
            redirect_stdout=is_stdout,
            redirect_stderr=is_stdout and sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=1.0)

    def line(self, *spans: Span) -> None:
        from rich.text import Text

        # soft_wrap leaves the wrapping of long lines to the terminal: a command can be copied in one piece.
        self._progress.console.print(Text.assemble(*spans), soft_wrap=True)

    def progress(self, fraction: float, text: str) -> None:
        self._progress.start()
        self._progress.update(self._task, completed=fraction, description=text, refresh=True)
        self.next_refresh = monotonic() + SECONDS_BETWEEN_REFRESHES

    def close(self) -> None:
        self._progress.stop()


def make_terminal(stream: TextIO, is_terminal: bool | None = None) -> Terminal:
    """Return a terminal with a progress bar if the stream can show one, else a plain one.

    Args:
        stream: where to write.
        is_terminal: overrides the detection by the stream and the environment variable TERM.
    """
    if is_terminal is None:
        is_terminal = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return ProgressBarTerminal(stream) if is_terminal else Terminal(stream)
