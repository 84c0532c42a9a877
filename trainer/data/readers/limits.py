"""Limits on what a file unpacks to: the few bytes of a header may claim any number."""

from __future__ import annotations

import psutil

from trainer.utils.text import format_bytes

MIN_FREE = 0.05  # of the memory, while files are unpacked


def check_unpacked_size(name: str, size: int) -> None:
    """Raise ValueError if an array of this many bytes does not fit into the machine's memory."""
    total = psutil.virtual_memory().total
    if size > total:
        raise ValueError(f"{name}: {format_bytes(size)} unpacked, and this machine has {format_bytes(total)} of memory")


def check_room(name: str) -> None:
    """Raise ValueError if the machine's memory is nearly full, while a file is unpacked."""
    memory = psutil.virtual_memory()
    if memory.available < MIN_FREE * memory.total:
        raise ValueError(
            f"{name}: unpacked it does not fit into the memory: {format_bytes(memory.available)} of "
            f"{format_bytes(memory.total)} are free"
        )
