"""Limits on what a file unpacks to: the few bytes of a header may claim any number."""

from __future__ import annotations

import psutil

from trainer.utils.text import format_bytes


def check_unpacked_size(name: str, size: int) -> None:
    """Raise ValueError if an array of this many bytes does not fit into the machine's memory."""
    total = psutil.virtual_memory().total
    if size > total:
        raise ValueError(f"{name}: {format_bytes(size)} unpacked, and this machine has {format_bytes(total)} of memory")
