"""Batching without a timer: a batch is what has queued while the one before it was computed.

An idle server adds no waiting, and a busy one makes batches by itself. The models take turns.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from trainer.service.engine import Tensors
from trainer.service.errors import ExpiredError, InferenceError, InvalidRequestError, OverloadedError
from trainer.service.meters import Meters
from trainer.service.protocol import InferenceRequest
from trainer.service.repository import ServedVersion


@dataclass(slots=True, eq=False)
class Pending:
    """A request that queues, and the future of its answer. It is not computed once that is done."""

    version: ServedVersion
    inputs: Tensors
    rows: int
    answer: asyncio.Future[Tensors]
    queued_ns: int = field(default_factory=time.perf_counter_ns)

    def joins(self, other: Pending) -> bool:
        """Whether both can be rows of one batch."""
        return (
            self.version is other.version
            and self.version.signature.is_batched
            and all(tensor.shape[1:] == other.inputs[name].shape[1:] for name, tensor in self.inputs.items())
        )


class Batcher:
    """Queues of requests, one for each model, and the thread that computes their batches.

    Args:
        max_batch: rows that the model computes together; a request with more is computed in parts.
        capacity: requests that may queue for a model.
        meters: where they are counted.
    """

    def __init__(self, max_batch: int, capacity: int, meters: Meters):
        self.max_batch, self._capacity, self._meters = max_batch, capacity, meters
        self._queues = OrderedDict[str, deque[Pending]]()
        self._thread = ThreadPoolExecutor(1, "batches")
        self._is_busy = False

    def submit(self, version: ServedVersion, request: InferenceRequest) -> asyncio.Future[Tensors]:
        """Queue a request. To cancel the future takes it back.

        Raises:
            OverloadedError: the queue is full.
        """
        loop = asyncio.get_running_loop()
        queue = self._queues.setdefault(version.model, deque())
        if len(queue) >= self._capacity:
            raise OverloadedError(f"queue of {version.model}: got {len(queue) + 1} requests, wanted {self._capacity}")
        answer: asyncio.Future[Tensors] = loop.create_future()
        queue.append(Pending(version, request.inputs, request.rows, answer))
        if request.timeout_us:
            loop.call_later(request.timeout_us / 1e6, _expire, answer, request.timeout_us)
        if not self._is_busy:
            self._is_busy = True
            # Two turns of the loop later: all requests that have arrived with this one have been read by then.
            loop.call_soon(lambda: loop.call_soon(lambda: loop.call_soon(self._compute_next)))
        return answer

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compute_next(self) -> None:
        batch = self._next_batch()
        self._is_busy = bool(batch)
        if batch:
            future = asyncio.get_running_loop().run_in_executor(self._thread, compute, batch, self.max_batch)
            future.add_done_callback(lambda done: self._answer(batch, done.result()))

    def _next_batch(self) -> list[Pending]:
        """Take a batch from the queue of the model that has waited longest for its turn."""
        batch: list[Pending] = []
        while self._queues and not batch:
            model, queue = self._queues.popitem(last=False)
            rest, rows = deque[Pending](), 0
            for pending in queue:
                if pending.answer.done():
                    continue
                if not batch or (rows + pending.rows <= self.max_batch and pending.joins(batch[0])):
                    batch.append(pending)
                    rows += pending.rows
                else:
                    rest.append(pending)
            if rest:
                self._queues[model] = rest
            self._meters.pending.labels(model).set(len(rest))
        return batch

    def _answer(self, batch: Sequence[Pending], answers: Sequence[Tensors | InferenceError]) -> None:
        for pending, answer in zip(batch, answers, strict=True):
            if pending.answer.done():  # its client has gone meanwhile
                continue
            if isinstance(answer, InferenceError):
                pending.answer.set_exception(answer)
            else:
                pending.answer.set_result(answer)
        self._compute_next()


def compute(batch: Sequence[Pending], max_batch: int) -> list[Any]:
    """Compute a batch; return the outputs of each request, or its error.

    If the batch fails, each request is computed by itself: one that the model refuses does not spoil the others.
    """
    version, count = batch[0].version, len(batch)
    times = [time.perf_counter_ns()]
    try:
        inputs = batch[0].inputs
        if count > 1:
            inputs = {name: np.concatenate([pending.inputs[name] for pending in batch]) for name in inputs}
        times.append(time.perf_counter_ns())
        outputs = _run(version, inputs, max_batch)
        times.append(time.perf_counter_ns())
        answers = _split(outputs, [pending.rows for pending in batch])
        times.append(time.perf_counter_ns())
    except Exception as error:
        if count > 1:
            return [answer for pending in batch for answer in compute([pending], max_batch)]
        kind = InvalidRequestError if isinstance(error, ValueError) else InferenceError
        return [kind(f"{version.model} version {version.number} fails: {error}")]
    queued = sum(times[0] - pending.queued_ns for pending in batch) / 1000
    phases = [count * (end - begin) / 1000 for begin, end in pairwise(times)]
    version.meters.batch(sum(pending.rows for pending in batch), queued, *phases)
    return answers


def _run(version: ServedVersion, inputs: Tensors, max_batch: int) -> Tensors:
    """Compute the outputs, of at most `max_batch` rows at once: memory does not grow with the rows of a request."""
    rows = len(next(iter(inputs.values())))
    if rows <= max_batch or not version.signature.is_batched:
        return version.engine.run(inputs)
    parts = [
        version.engine.run({name: tensor[begin : begin + max_batch] for name, tensor in inputs.items()})
        for begin in range(0, rows, max_batch)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _split(outputs: Tensors, rows: Sequence[int]) -> list[Tensors]:
    """Return the outputs of each request, as views of the batch's."""
    if len(rows) == 1:
        return [outputs]
    ends = np.cumsum(rows)
    for name, tensor in outputs.items():
        if len(tensor) != ends[-1]:
            raise RuntimeError(f"{name} has {len(tensor)} rows for {ends[-1]} examples")
    return [
        {name: tensor[end - size : end] for name, tensor in outputs.items()}
        for end, size in zip(ends, rows, strict=True)
    ]


def _expire(answer: asyncio.Future[Tensors], timeout_us: int) -> None:
    if not answer.done():
        answer.set_exception(ExpiredError(f"timeout: {timeout_us} microseconds are over"))
