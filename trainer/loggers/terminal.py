"""Where the console writes: lines in a log here, a bar on a terminal in bar.py."""

from __future__ import annotations

from time import monotonic
from typing import Protocol, TextIO

from trainer.loggers.messages import Span

SECONDS_BETWEEN_LINES = 10.0


class Terminal(Protocol):
    """Shows lines that stay and progress that passes. `next_refresh`: when progress is wanted next, in monotonic seconds."""

    next_refresh: float

    def line(self, *spans: Span) -> None:
        """Show a line that stays."""
        ...

    def progress(self, fraction: float, text: str) -> None:
        """Show how far the run is, 0 to 1, and set when it is wanted next."""
        ...

    def close(self) -> None:
        """Leave the stream as it was found, open."""
        ...


class PlainTerminal:
    """A screen for logs: no colour, and progress only after 10 seconds of silence."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.next_refresh = 0.0

    def line(self, *spans: Span) -> None:
        text = "".join(span if isinstance(span, str) else span[0] for span in spans)
        print(text.rstrip(), file=self._stream, flush=True)
        self.next_refresh = monotonic() + SECONDS_BETWEEN_LINES

    def progress(self, fraction: float, text: str) -> None:
        self.line(text)

    def close(self) -> None:
        """Nothing to put back."""
