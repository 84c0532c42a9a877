"""A bound for the bytes of all requests that the server holds: those that arrive, that queue, and that are computed."""

from __future__ import annotations

from types import TracebackType

from trainer.service.errors import OverloadedError

BODIES = 16  # of the largest size, at once


class RequestMemory:
    """Counts the bytes of requests.

    Args:
        max_bytes: of all requests together.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.held = max_bytes, 0

    def hold(self) -> HeldBytes:
        """Return a context of one request, whose bytes are released when it is left."""
        return HeldBytes(self)


class HeldBytes:
    """The bytes of one request."""

    __slots__ = ("_memory", "_size")

    def __init__(self, memory: RequestMemory):
        self._memory, self._size = memory, 0

    def add(self, size: int) -> None:
        """Count bytes of the request.

        Raises:
            OverloadedError: all requests together would have too many.
        """
        memory = self._memory
        if memory.held + size > memory.max_bytes:
            raise OverloadedError(
                f"memory: got {memory.held + size} bytes of all requests at once, wanted at most {memory.max_bytes}"
            )
        memory.held += size
        self._size += size

    def __enter__(self) -> HeldBytes:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._memory.held -= self._size
