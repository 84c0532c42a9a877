"""How a run may end before its last round, other than by a failure."""

from __future__ import annotations

from collections.abc import Sequence

Window = tuple[int, int, int]  # batches of a round: its index, the first step, the one after the last


class Diverged(RuntimeError):
    """The numbers are of no use any more, and starting again would not mend them.

    Where leaving out batches would: `window`, the round's index and the step up to which, and those `skipped` before.
    """

    def __init__(self, message: str, window: tuple[int, int] | None = None, skipped: Sequence[Window] = ()):
        super().__init__(message)
        self.window, self.skipped = window, list(skipped)


class Preempted(Exception):
    """The run was told to leave, and has: all that it needs to go on is on disk, if it makes checkpoints."""
