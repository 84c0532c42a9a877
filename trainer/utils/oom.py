"""Room in memory: what is said when there is none."""

from __future__ import annotations

import re

import torch

from trainer.utils.text import format_value


class OutOfMemoryError(ValueError):
    """There is no room for so many examples at once; the message is for the user."""


# What is said where there is no exception of its own: of the CPU's memory, and by CUDA's libraries.
OOM_MESSAGES = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


def raise_if_oom(error: RuntimeError | MemoryError, key: str, value: object, examples: int) -> None:
    """Raises OutOfMemoryError when `error` says that so many examples at once, by this key's value, found no room.

    What is proposed is the largest power of two up to the half of them.
    """
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(
        said in str(error) for said in OOM_MESSAGES
    ):
        return
    way_out = f"set {key}={1 << (examples // 2).bit_length() - 1} or less" if examples > 1 else "take a smaller model"
    if key == "micro_batch_size" and value != "auto":
        way_out += f", or {key}=auto, which finds the largest that fits"
    wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
    missing = f": {wanted[1]} more could not be had" if wanted else ""
    raise OutOfMemoryError(
        f"{key}={format_value(value)}: there is no room in memory for {examples} examples at once{missing}.\n  {way_out}"
    ) from error
