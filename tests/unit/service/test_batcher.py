"""Batches are what has queued meanwhile, and their answers those of requests one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from threading import Event

import numpy as np
import pytest

from tests.support.exported import weights, write_linear
from trainer.service.batcher import Batcher
from trainer.service.engine import Tensors
from trainer.service.errors import ExpiredError, InferenceError, InvalidRequestError, OverloadedError
from trainer.service.meters import Meters
from trainer.service.protocol import InferenceRequest
from trainer.service.repository import Repository, ServedVersion


class Gate:
    """An engine that computes when it is let, and notes the number of rows of its batches."""

    platform = "test"

    def __init__(self, engine):
        self._engine, self.batches, self.open = engine, [], Event()
        self.open.set()

    def run(self, inputs: Tensors) -> Tensors:
        assert self.open.wait(30)
        self.batches.append(len(inputs["inputs"]))
        if np.isnan(inputs["inputs"]).any():
            raise ValueError("NaN is refused")
        if np.isinf(inputs["inputs"]).any():
            raise ZeroDivisionError
        return self._engine.run(inputs)


@pytest.fixture
def version(tmp_path) -> ServedVersion:
    write_linear(tmp_path / "linear", 1)
    repository = Repository(tmp_path, 1, Meters())
    repository.refresh()
    version = repository.find("linear")
    return replace(version, engine=Gate(version.engine))


def request(*rows: float, timeout_us: int = 0) -> InferenceRequest:
    inputs = np.array(rows, np.float32)[:, None].repeat(4, 1)
    return InferenceRequest({"inputs": inputs}, ["outputs", "label"], timeout_us=timeout_us)


def expected(given: InferenceRequest) -> np.ndarray:
    return given.inputs["inputs"] @ weights(1)


async def settled(*answers: Awaitable[Tensors]) -> list[Tensors | BaseException]:
    return await asyncio.gather(*answers, return_exceptions=True)


def test_what_queues_while_a_batch_is_computed_is_the_next_batch(version):
    requests = [request(*range(index, index + 1 + index % 3)) for index in range(12)]

    async def run() -> list[Tensors | BaseException]:
        batcher = Batcher(8, 100, Meters())
        version.engine.open.clear()
        first = batcher.submit(version, requests[0])
        await asyncio.sleep(0.05)
        others = [batcher.submit(version, each) for each in requests[1:]]
        version.engine.open.set()
        return await settled(first, *others)

    answers = asyncio.run(run())
    for given, answer in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(answer["outputs"], expected(given))
    assert version.engine.batches[0] == 1
    assert all(rows <= 8 for rows in version.engine.batches)
    assert sum(version.engine.batches) == sum(given.rows for given in requests)
    assert len(version.engine.batches) <= 5


def test_requests_that_arrive_together_are_one_batch_and_a_large_one_is_a_batch_by_itself(version):
    async def run() -> None:
        batcher = Batcher(4, 100, Meters())
        await settled(
            *(batcher.submit(version, request(1)) for _ in range(3)), batcher.submit(version, request(*[2] * 9))
        )

    asyncio.run(run())
    assert version.engine.batches == [3, 9]


def test_a_full_queue_refuses_at_once_and_goes_on(version):
    async def run() -> list[Tensors | BaseException]:
        batcher = Batcher(4, 2, Meters())
        version.engine.open.clear()
        first = batcher.submit(version, request(1))
        await asyncio.sleep(0.05)
        queued = [batcher.submit(version, request(2)) for _ in range(2)]
        with pytest.raises(OverloadedError, match="queue of linear: got 3 requests, wanted 2"):
            batcher.submit(version, request(3))
        version.engine.open.set()
        answers = await settled(first, *queued)
        await batcher.submit(version, request(4))
        return answers

    assert [answer["label"].tolist() for answer in asyncio.run(run())] == [[2]] * 3


def test_only_the_requests_that_the_model_refuses_fail(version):
    values = [1, np.nan, 2, np.inf]

    async def run() -> list[Tensors | BaseException]:
        batcher = Batcher(64, 100, Meters())
        return await settled(*(batcher.submit(version, request(value)) for value in values))

    good, invalid, also_good, failed = asyncio.run(run())
    np.testing.assert_array_equal(good["outputs"], expected(request(1)))
    np.testing.assert_array_equal(also_good["outputs"], expected(request(2)))
    assert isinstance(invalid, InvalidRequestError)
    assert "NaN is refused" in str(invalid)
    assert type(failed) is InferenceError


def test_who_has_gone_or_waits_no_longer_is_not_computed(version):
    async def run() -> list[Tensors | BaseException]:
        batcher = Batcher(64, 100, Meters())
        version.engine.open.clear()
        first = batcher.submit(version, request(1))
        await asyncio.sleep(0.05)
        gone, late = batcher.submit(version, request(*[2] * 10)), batcher.submit(version, request(3, timeout_us=1000))
        last = batcher.submit(version, request(4, timeout_us=10_000_000))
        gone.cancel()
        await asyncio.sleep(0.05)
        version.engine.open.set()
        return await settled(first, late, last)

    _, late, last = asyncio.run(run())
    assert isinstance(late, ExpiredError)
    np.testing.assert_array_equal(last["outputs"], expected(request(4)))
    assert version.engine.batches == [1, 1]


def test_models_take_turns(version):
    others = replace(version, model="other", engine=Gate(version.engine))
    order = list[str]()

    async def run() -> None:
        batcher = Batcher(1, 100, Meters())
        answers = []
        for each in (version, version, version, others):
            answers.append(batcher.submit(each, request(1)))
            answers[-1].add_done_callback(lambda _, each=each: order.append(each.model))
        await settled(*answers)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert order == ["linear", "other", "linear", "linear"]
