"""The console's screen on a terminal. Imports rich at its top, so it is imported only where there is a terminal."""

from __future__ import annotations

import sys
from time import monotonic
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.loggers.messages import Span

SECONDS_BETWEEN_REFRESHES = 0.5


class ProgressBarTerminal:
    """A screen for terminals: a bar at the bottom, redrawn twice a second, and lines that scroll above it."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, force_terminal=True, force_interactive=True)
        # What others print goes above the bar too, but never from a file they chose to this terminal.
        is_stdout = stream is sys.stdout
        self._live = Live(
            console=self._console,
            auto_refresh=False,  # it would start a thread, and each time that wakes a step waits for the interpreter
            transient=True,
            redirect_stdout=is_stdout,
            redirect_stderr=is_stdout and sys.stderr.isatty(),
        )
        self.next_refresh = 0.0

    def line(self, *spans: Span) -> None:
        # soft_wrap leaves breaking long lines to the terminal, so a command can be copied whole.
        self._console.print(Text.assemble(*spans), soft_wrap=True)

    def progress(self, fraction: float, text: str) -> None:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(ProgressBar(total=1.0, completed=fraction), Text(text))
        self._live.start()
        self._live.update(row, refresh=True)
        self.next_refresh = monotonic() + SECONDS_BETWEEN_REFRESHES

    def close(self) -> None:
        self._live.stop()
