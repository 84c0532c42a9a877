"""Errors of batches that do not fit in memory."""

from __future__ import annotations

import re

import torch

from trainer.utils.errors import InputError
from trainer.utils.text import format_value


class OutOfMemoryError(InputError):
    """A batch does not fit in memory; the message has the key to change."""


# Parts of the messages of RuntimeErrors by the CPU allocator and by CUDA's libraries, which have no exception class.
OOM_MESSAGES = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


def raise_if_oom(error: RuntimeError | MemoryError, key: str, value: object, examples: int) -> None:
    """Raise OutOfMemoryError if `error` means that a batch did not fit in memory; else return.

    Args:
        error: raised by the forward or backward pass.
        key: the configuration key of the batch size.
        value: its value.
        examples: the examples in the batch. The message proposes the largest power of two up to half of them.
    """
    is_oom = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if not is_oom and not any(message in str(error) for message in OOM_MESSAGES):
        return
    remedy = f"set {key}={1 << (examples // 2).bit_length() - 1} or less" if examples > 1 else "take a smaller model"
    if key == "micro_batch_size" and value != "auto":
        remedy += f", or {key}=auto, which finds the largest that fits"
    requested = re.search(r"allocate ([\d.]+ \w+)", str(error))
    missing = f": could not allocate {requested[1]}" if requested else ""
    raise OutOfMemoryError(
        f"{key}={format_value(value)}: {examples} examples at once do not fit in memory{missing}.\n  {remedy}"
    ) from error
