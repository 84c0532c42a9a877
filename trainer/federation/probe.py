"""A probe of a member's link to the coordinator: clocks, versions, and bytes a second. It is no part of a run.

The member sends some empty parts, which the coordinator answers with its clock and its versions. Then one side fills
the link for a while, and after it the other. Bytes are counted where they arrive, and both sides end it by their own
clock.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from trainer.federation.link import PROBE
from trainer.federation.messages import Limit, Message, MessageReader
from trainer.federation.registry import RefusedError
from trainer.utils.version import __version__

PINGS = 8  # the fastest counts
FILL_SECONDS = 2.0  # in each direction
MAX_BYTES = 1 << 28  # in each direction
FILLER_BYTES = 1 << 16  # of a part: it arrives within a second on a link of 1 Mbit/s
LIMIT_SECONDS = 30.0  # of the whole
BYTES_PER_SECOND = "bytes_per_second"

VERSIONS = {"silotrain": __version__, "torch": str(torch.__version__)}


@dataclass(frozen=True)
class LinkFacts:
    """The findings of a probe.

    Attributes:
        latency: seconds of a message and its answer.
        clock_offset: seconds by which the coordinator's clock is ahead.
        up: bytes a second to the coordinator.
        down: bytes a second from it.
        versions: of the coordinator, by package.
    """

    latency: float
    clock_offset: float
    up: float
    down: float
    versions: dict[str, str]


class LinkProbe:
    """The member's end of a probe: `parts` are what it sends, and `facts` reads what comes back, in another thread."""

    def __init__(self):
        self._sent = 0.0
        self._answered, self._is_counted = threading.Semaphore(0), threading.Event()

    def parts(self) -> Iterator[bytes]:
        """Yield the empty parts, each after the answer to the one before, and then filler until it is counted."""
        for _ in range(PINGS):
            self._sent = time.time()
            yield b""
            self._answered.acquire()
        filler = os.urandom(FILLER_BYTES)
        while not self._is_counted.is_set():
            yield filler

    def facts(self, answers: Iterator[bytes]) -> LinkFacts:
        """Read the answers.

        Raises:
            MessageError: the coordinator answers otherwise, as with another protocol.
        """
        header, pings = {}, []
        try:
            for _ in range(PINGS):
                header = _header(answers)
                received = time.time()
                latency = received - self._sent
                pings.append((latency, header["time"] - self._sent - latency / 2))
                self._answered.release()
            up = _header(answers)[BYTES_PER_SECOND]
        finally:
            self._is_counted.set()
            self._answered.release()
        latency, clock_offset = min(pings)
        return LinkFacts(latency, clock_offset, up, _count(answers), header["versions"])


def probe_link(channel: grpc.Channel) -> LinkFacts:
    """Probe the link to the coordinator.

    Raises:
        ValueError: the coordinator refuses it, or the link breaks: why, and the remedy in a line of its own.
    """
    probe = LinkProbe()
    call = channel.stream_stream(PROBE)(probe.parts(), timeout=LIMIT_SECONDS)
    try:
        return probe.facts(call)
    except grpc.RpcError as error:
        raise ValueError(f"the link cannot be measured: {call.details()}") from error
    finally:
        call.cancel()


class Probes:
    """The coordinator's end of probes, of which there is one at a time: they would measure each other."""

    def __init__(self):
        self._is_busy = threading.Lock()

    def answer(self, parts: Iterator[bytes], cancel: Callable[[], object]) -> Iterator[bytes]:
        """Answer the probe of a member.

        Args:
            parts: what it sends.
            cancel: ends the probe, if that takes too long.

        Raises:
            RefusedError: another member's is under way.
        """
        if not self._is_busy.acquire(blocking=False):
            raise RefusedError("another site measures its link now\n  try again in half a minute")
        limit = threading.Timer(LIMIT_SECONDS, cancel)
        limit.daemon = True
        limit.start()
        try:
            for _ in zip(range(PINGS), parts, strict=False):
                yield from Message({"time": time.time(), "versions": VERSIONS}).parts()
            yield from Message({BYTES_PER_SECOND: _count(parts)}).parts()
            yield from _filler()
        finally:
            limit.cancel()
            self._is_busy.release()


def _filler() -> Iterator[bytes]:
    filler, began = os.urandom(FILLER_BYTES), time.monotonic()
    for _ in range(MAX_BYTES // FILLER_BYTES):
        if time.monotonic() - began > 2 * FILL_SECONDS:  # the member has counted enough by then
            return
        yield filler


def _count(parts: Iterator[bytes]) -> float:
    """Return the bytes a second with which parts arrive, from the first one on."""
    next(parts, b"")
    began, received = time.monotonic(), 0
    for part in parts:
        received += len(part)
        if time.monotonic() - began > FILL_SECONDS or received >= MAX_BYTES:
            break
    return received / max(time.monotonic() - began, 1e-6)


def _header(answers: Iterator[bytes]) -> Mapping[str, Any]:
    """Read the next answer, a message of one part; it says of which protocol it is."""
    reader = MessageReader(Limit())
    reader.add(next(answers, b""))
    return reader.finish().header
