"""How a run may end before its last round, other than by a failure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trainer.config import shown

Window = tuple[int, int, int]  # batches of a round: its index, the first step, the one after the last


Reason = Literal["target", "patience", "seconds"]  # of Stop, why a run has ended


@dataclass(frozen=True)
class Stop:
    """When a run is finished before its last round; what is None does not end it.

    target    the value of the validation set's headline figure that is wanted, or a better one
    patience  evaluations in a row that bring no better value
    seconds   of training, evaluations excluded, over all starts; the round that is under way is done to its end
    """

    target: float | None = None
    patience: int | None = None
    seconds: float | None = None


class Diverged(RuntimeError):
    """The numbers are of no use any more, and starting again would not mend them.

    Where leaving out batches would: `window`, the round's index and the step up to which, and those `skipped` before.
    """

    def __init__(self, message: str, window: tuple[int, int] | None = None, skipped: Sequence[Window] = ()):
        super().__init__(message)
        self.window, self.skipped = window, list(skipped)


class OutOfMemory(ValueError):
    """There is no room for so many examples at once; the message is for the user."""


# What is said where there is no exception of its own: of the CPU's memory, and by CUDA's libraries.
NO_ROOM = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


def check_room(error: RuntimeError | MemoryError, key: str, value: object, examples: int) -> None:
    """Raises OutOfMemory when `error` says that so many examples at once, by this key's value, found no room.

    What is proposed is the largest power of two up to the half of them.
    """
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(said in str(error) for said in NO_ROOM):
        return
    way_out = f"set {key}={1 << (examples // 2).bit_length() - 1} or less" if examples > 1 else "take a smaller model"
    if key == "micro_batch_size" and value != "auto":
        way_out += f", or {key}=auto, which finds the largest that fits"
    wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
    missing = f": {wanted[1]} more could not be had" if wanted else ""
    raise OutOfMemory(
        f"{key}={shown(value)}: there is no room in memory for {examples} examples at once{missing}.\n  {way_out}"
    ) from error


class Preempted(Exception):
    """The run was told to leave, and has: all that it needs to go on is on disk, if it makes checkpoints."""
