"""Time limit for operations that would otherwise wait for half an hour."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer


@contextmanager
def watchdog(seconds: float, message: str) -> Iterator[None]:
    """Exit with code 1 and a message, unless the block ends within `seconds`."""

    def give_up() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    timer = Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
